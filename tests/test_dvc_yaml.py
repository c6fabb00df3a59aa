"""dvc.yaml says what the code says: dependencies are the import closure, outs are ignored by git, metrics are not."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelib.cli.plots_page import make_page
from pipelib.workspace.places import HERE
from pipelib.workspace.provenance import EXEMPT, import_closure, versions
from pipelib.workspace.stages import LAST, Stage, upstream
from pipelib.workspace.stages import STAGES as TABLE

ROOT = Path(__file__).parents[1]
STAGES = tuple(TABLE)
DATA_DEPS = {
    "download": ["${download.path}", "constraints.txt"],
    "vocabulary": ["data/raw", "data/benchmarks/manifest.json"],
    "tokenize": ["data/raw", "data/benchmarks/manifest.json", "data/vocabulary"],
    "train": ["data/vocabulary", "data/tokens", "data/models/manifest.json", "data/benchmarks/hellaswag.jsonl"],
    "finetune": [
        "models", "data/vocabulary", "data/raw/manifest.json", "data/tokens/manifest.json", "data/tokens/unigram_counts.npy",
        "data/tokens/val_000000.bin", "data/models/manifest.json", "data/conversations", "${finetune.path}",
    ],
    "evaluate": [
        "chat", "curves", "data/benchmarks", "data/models/manifest.json", "data/tokens/manifest.json",
        "data/tokens/unigram_counts.npy", "data/tokens/val_000000.bin", "data/vocabulary", "models",
    ],
}  # fmt: skip
"""Dependencies that are not code."""
ROTARY = ["src/pipelib/model/rotary.py", "src/pipelib/model/rotary_params.py"]
"""What the families chosen by name import: a file that is there for them alone."""
BESIDE_CODE = {
    "train": ROTARY,
    "finetune": ROTARY,
    "download": ["src/pipelib/corpus/hub_benchmarks.yaml", "src/pipelib/corpus/published_models.yaml"],
    "evaluate": [
        *ROTARY,
        *(path.relative_to(ROOT).as_posix() for path in (ROOT / "src/pipelib/evaluation/tasks").glob("*.yaml")),
    ],
}
"""Files that code reads as if they were code."""


@cache
def dvc_yaml() -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    return value


def stage_of(name: str) -> dict[str, Any]:
    stage: dict[str, Any] = dvc_yaml()["stages"][name]
    return stage


def metrics_of(name: str) -> dict[str, Any]:
    return {path: options for entry in stage_of(name)["metrics"] for path, options in entry.items()}


# ---- Dependencies ----------------------------------------------------------------------------------------------------


def test_the_four_stages_run_as_modules() -> None:
    assert tuple(dvc_yaml()["stages"]) == STAGES
    for name in STAGES:
        assert stage_of(name)["cmd"] == f"${{run}} stages.{name}"
    (run,) = dvc_yaml()["vars"]
    assert run["run"].endswith("python -m")


def choices_of(name: str) -> list[Path]:
    """Every file that parameters can choose for a stage."""
    patterns = [re.sub(r"\$\{[\w.]+\}", "[a-z]*", template) for template in TABLE[name].chosen]
    return [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)]


@pytest.mark.parametrize("name", STAGES)
def test_dependencies_are_the_import_closure(name: str) -> None:
    choices = choices_of(name)
    code = [path.as_posix() for path in import_closure(ROOT, HERE.stage(name), *choices) if path not in choices]
    expected = {*code, *TABLE[name].chosen, *DATA_DEPS.get(name, []), *BESIDE_CODE.get(name, [])}
    listed = stage_of(name)["deps"]
    assert len(set(listed)) == len(listed), "a dependency is listed twice"
    paste = "".join(f"      - {path}\n" for path in code)
    missing, extra = sorted(expected - set(listed)), sorted(set(listed) - expected)
    assert not missing and not extra, (  # noqa: PT018  (one message for both)
        f"dvc.yaml, stage {name}: missing {missing}, too much {extra} (data belongs in DATA_DEPS); the code it needs is\n{paste}"
    )


def test_exempt_files_exist_have_a_reason_and_are_no_dependency() -> None:
    listed = {path for name in STAGES for path in stage_of(name)["deps"]}
    for path, reason in EXEMPT.items():
        assert (ROOT / path).is_file()
        assert len(reason) > 10
        assert path not in listed


def test_an_edit_reruns_no_more_than_it_must() -> None:
    """The model does not re-tokenize, a training parameter does not re-download, evaluation does not re-train."""
    stages = {name: {path.as_posix() for path in import_closure(ROOT, HERE.stage(name))} for name in STAGES}

    def rerun_by(path: str) -> set[str]:
        return {name for name in STAGES if f"src/pipelib/{path}" in stages[name]}

    assert rerun_by("model/decoder.py") == {"train", "finetune", "evaluate"}
    assert rerun_by("training/params.py") == {"train", "finetune"}
    assert rerun_by("training/loop.py") == {"train", "finetune"}
    assert rerun_by("training/pretraining.py") == {"train"}
    assert rerun_by("finetuning/packing.py") == rerun_by("model/adapters.py") == {"finetune"}
    assert rerun_by("evaluation/report.py") == {"evaluate"}
    assert rerun_by("corpus/download.py") == {"download"}
    assert rerun_by("corpus/sources/docs.py") == set()  # but where it is chosen
    assert rerun_by("tokens/encode_corpus.py") == {"tokenize"}
    assert rerun_by("tokens/loader.py") == {"train", "finetune", "evaluate"}
    assert rerun_by("progress.py") == rerun_by("tracking/run.py") == set()
    assert rerun_by("schema.py") == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_parameters_of_each_stage(name: str) -> None:
    assert stage_of(name)["params"] == [*TABLE[name].sections]


@pytest.mark.parametrize("name", STAGES)
def test_the_table_says_what_each_stage_reads(name: str) -> None:
    made_by = {out: stage for stage in STAGES for out in stage_of(stage)["outs"]}
    data = [Path(dep) for dep in DATA_DEPS.get(name, [])]
    read = {made_by[folder] for dep in data for folder in map(str, (dep, *dep.parents)) if folder in made_by}
    assert set(TABLE[name].reads) == read
    assert TABLE[name].dataset == "" or made_by[TABLE[name].dataset] in read


def test_no_other_stage_reads_the_last_one() -> None:
    """Side branches may end elsewhere."""
    assert LAST in STAGES
    assert not any(LAST in stage.reads for stage in TABLE.values())


@pytest.mark.parametrize("name", STAGES)
def test_packages_that_decide_are_installed(name: str) -> None:
    assert "not installed" not in versions(*TABLE[name].packages).values()


def test_a_branch_has_its_own_lineage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands before a stage in the table is not what it depends on."""
    branch = Stage("branch", "Another model", ("train",), "", ("branch",), ())
    monkeypatch.setitem(TABLE, "branch", branch)
    assert [*upstream("branch")] == ["download", "vocabulary", "tokenize", "train"]
    assert [*upstream("tokenize")] == ["download", "vocabulary"]
    assert "branch" not in upstream("evaluate")


# ---- Outs, metrics, plots --------------------------------------------------------------------------------------------


def test_nothing_switches_the_run_cache_off() -> None:
    for name in STAGES:
        stage = stage_of(name)
        assert set(stage) == {"cmd", "deps", "params", "outs", "metrics"}
        assert all(isinstance(out, str) for out in stage["outs"]), "an out has options"
        assert all(options == {"cache": False} for options in metrics_of(name).values())


@pytest.mark.parametrize("name", STAGES)
def test_metrics_are_those_that_the_stage_writes(name: str) -> None:
    """Speed is an out and no metric: it changes with every run, and would bury what changed in `dvc metrics diff`."""
    assert set(metrics_of(name)) == {str(HERE.result(name))}
    curve = {str(HERE.speed(name, "csv"))} if name in ("train", "finetune") else set()
    assert {path for path in stage_of(name)["outs"] if path.startswith("metrics/")} == {str(HERE.speed(name)), *curve}


def is_ignored(path: str) -> bool:
    done = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT, check=False)
    assert done.returncode in (0, 1), "git cannot say what it ignores"
    return done.returncode == 0


def test_git_ignores_every_cached_out_and_no_metric() -> None:
    for name in STAGES:
        for out in stage_of(name)["outs"]:
            assert is_ignored(f"{out}/x"), f".gitignore lacks /{out.split('/')[0]}/"
        for metric in metrics_of(name):
            assert not is_ignored(metric), metric
    assert not is_ignored("dvc.lock")
    assert is_ignored(".pipelib/x")
    assert is_ignored("mlflow.db")


def plots() -> dict[str, Any]:
    return {name: options for plot in dvc_yaml()["plots"] for name, options in plot.items()}


def test_plots_show_columns_of_files_that_train_makes() -> None:
    from pipelib.training import training_log
    from pipelib.training.roles import ROLES

    written = Path(training_log.__file__).read_text(encoding="utf-8")
    files = {path for options in plots().values() for path in options["y"]}
    assert files == {
        "curves/train.csv", "curves/validation.csv", "curves/hellaswag.csv", "curves/update_sizes.csv",
        "metrics/speed/train.csv",
    }  # fmt: skip
    outs = stage_of("train")["outs"]
    assert all(path in outs or path.split("/")[0] in outs for path in files)
    for options in plots().values():
        for names in (options["x"], *options["y"].values()):
            for column in [names] if isinstance(names, str) else names:
                assert column in ROLES or f'"{column}"' in written, f"nothing writes the column {column}"


def test_each_plot_has_a_template_that_uses_what_the_plot_says() -> None:
    for options in plots().values():
        text = (ROOT / f".dvc/plots/{options['template']}.json").read_text(encoding="utf-8")
        json.loads(text)
        for anchor in ("DATA", "TITLE", "X_LABEL", "Y_LABEL", "COLOR"):
            assert f'"<DVC_METRIC_{anchor}>"' in text


def test_the_page_of_the_plots_needs_no_server() -> None:
    page = make_page()
    rest = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert len(page) > 500_000, "the scripts are in it"
    assert "<script" not in rest
    assert "{scripts}" not in page, "DVC would put its links to a server there"
    assert page.count("{plot_divs}") == rest.count("{plot_divs}") == 1
    assert page.count("{refresh_tag}") == rest.count("{refresh_tag}") == 1


# ---- Imports point one way -------------------------------------------------------------------------------------------

FLOORS = (
    {"errors", "files", "processes", "pool", "progress", "schema"},
    {"workspace"},
    {"tracking"},
    {"stage"},
    {"corpus"},
    {"vocabulary"},
    {"model", "tokens"},
    {"evaluation", "serving"},
    {"training"},
    {"finetuning"},
    {"params"},
    {"inspection"},
    {"cli"},
)
"""The wings and single files from the ground up; stages/ is above them all."""
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "src/pipelib").rglob("*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path, top_level: bool) -> set[str]:
    """The modules of pipelib that a file imports, all of them or those imported with it."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return {name for name in names if name in modules() and name != "pipelib"}


def room_of(module: str) -> str:
    """The wing or single file of pipelib that a module is or is in."""
    return module.split(".")[1]


def test_everything_has_its_floor() -> None:
    assert {room_of(module) for module in modules() if module != "pipelib"} == set(HEIGHT)


def test_imports_point_down() -> None:
    for module in modules().keys() - {"pipelib"}:
        own = room_of(module)
        for imported in imports_of(modules()[module], top_level=False):
            room = room_of(imported)
            if room == own or HEIGHT[room] == HEIGHT[own] == 0:
                continue
            assert HEIGHT[room] < HEIGHT[own], f"{module} imports {imported}, which is not below it"


def test_params_puts_the_parameters_of_the_wings_together_and_needs_nothing_else_of_them() -> None:
    wings = {name for floor in FLOORS[4:10] for name in floor}
    for imported in imports_of(modules()["pipelib.params"], top_level=False):
        a_list = imported == "pipelib.corpus.published_models"
        assert room_of(imported) not in wings or imported.endswith(".params") or imported.count(".") == 1 or a_list, (
            imported
        )


def test_only_stages_and_what_commands_look_at_read_all_parameters() -> None:
    readers = {name for name, path in modules().items() if "pipelib.params" in imports_of(path, top_level=False)}
    assert {room_of(name) for name in readers} == {"inspection", "cli"}


def test_there_are_no_circles() -> None:
    graph = {name: imports_of(path, top_level=False) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join([*above, name])}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


# ---- What a process loads --------------------------------------------------------------------------------------------


def run_python(program: str) -> None:
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["pipelib.corpus.download", "pipelib.tokens.encode_corpus"])
def test_text_and_tokens_are_made_without_torch(module: str) -> None:
    program = f"import sys, {module}; assert 'torch' not in sys.modules"
    run_python(program)
    assert "torch" not in closure_imports(module)


def closure_imports(module: str) -> set[str]:
    """Every top package that the closure of a module names, inside functions too."""
    path = ROOT / "src" / Path(*module.split(".")).with_suffix(".py")
    found = set()
    for file in import_closure(ROOT, path.relative_to(ROOT)):
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found


def test_training_processes_start_with_torch_numpy_and_yaml_alone() -> None:
    """So they run on a bare GPU machine with another torch: what else they need is imported when it is used."""
    program = """
import importlib, importlib.metadata, os, sys, sysconfig
from pathlib import Path

import numpy, torch, yaml  # with whatever these load themselves

before = set(sys.modules)

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {"pipelib", "stages", "torch", "numpy", "yaml"} or top in sys.stdlib_module_names:
            return None
        if name in before:
            return None
        raise AssertionError(f"{name} is imported by a training process")

sys.meta_path.insert(0, Refuse())
for module in ("stages.train", "pipelib.training.launch.job", "pipelib.training.launch.torchrun"):
    if not (process := os.fork()):
        importlib.import_module(module)
        sys.exit()
    assert os.waitpid(process, 0)[1] == 0, module
"""
    run_python(program)
