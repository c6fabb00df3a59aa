"""The real DVC in a clone, as a person uses it: what runs, what does not, and what the commands print.

The tests of this file go on from each other, in their order, in one clone: with xdist a file stays on one worker.
"""

import ast
import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import vl_convert
import yaml
from small_browser import CHROMIUM, Browser
from small_corpus import make_texts, write_jsonl
from small_params import PARAMS, write_params
from small_project import CHECKOUT, copy_code
from test_extending import add
from warm_python import run_python, write_python

pytestmark = pytest.mark.dvc

STAGES = ("download", "vocabulary", "tokenize", "train", "finetune", "evaluate")


class Clone:
    """A clone of this checkout, its working tree included, with small parameters and a small corpus of its own.

    Commands run as in a new shell where no environment is activated: the clone's `.venv` is all there is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(root.parent / "home"),
            "DVC_SITE_CACHE_DIR": str(root.parent / "memo"),
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "PIPELIB_THREADS": "1",
            "PIPELIB_WORKERS": "1",
        }
        (root.parent / "home").mkdir()
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=CHECKOUT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            source, target = CHECKOUT / name, root / name
            if source.is_file() and name.split("/")[0] not in ("dvc.lock", "metrics", "tests", "bench", "docs"):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)  # which keeps what may be executed
        copy_code(root)  # as it is compiled
        write_params(root, train__min_lr=1e-6)
        write_jsonl(root / "texts/a.jsonl", make_texts(70))
        (root / ".venv").symlink_to(sys.prefix)
        (root / ".git/info").mkdir(parents=True)
        self.git("init", "--quiet", "--initial-branch=main")
        (root / ".git/info/exclude").write_text("/.venv\n")  # .gitignore names a folder, and this is a link
        self.git("config", "user.name", "Someone")
        self.git("config", "user.email", "someone@example.org")
        self.commit("the clone")

    def start_stages_warm(self) -> None:
        """Replace `.venv` by one whose python need not import torch. The first stages of a clone have the real one."""
        (self.root / ".venv").unlink()
        (self.root / ".venv/bin").mkdir(parents=True)
        for program in (Path(sys.prefix) / "bin").iterdir():
            if program.name != "python":
                (self.root / ".venv/bin" / program.name).symlink_to(program)
        write_python(self.root / ".venv/bin/python")

    @classmethod
    def of(cls, other: "Clone") -> "Clone":
        """A git clone of it in which nothing has run, with its remote of DVC."""
        new = cls.__new__(cls)
        new.root, new.environment = other.root.with_name("clone-of-it"), other.environment
        other.git("clone", "--quiet", ".", str(new.root))
        copy_code(new.root)  # as it is compiled
        (new.root / ".venv").symlink_to(other.root / ".venv")
        (new.root / ".git/info/exclude").write_text("/.venv\n")
        (new.root / ".dvc/config.local").write_bytes((other.root / ".dvc/config.local").read_bytes())
        return new

    def run(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def fails(self, command: Sequence[str]) -> str:
        """What a command prints that must fail without a traceback."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        said = done.stdout + done.stderr
        assert done.returncode != 0, said
        assert "Traceback" not in said
        return said

    def activate(self) -> None:
        """As `source .venv/bin/activate` does."""
        self.environment["PATH"] = f"{self.root}/.venv/bin:/usr/bin:/bin"

    def git(self, *arguments: str) -> str:
        return self.run(["git", *arguments])

    def dvc(self, *arguments: str) -> str:
        done = run_python(self.root / ".venv/bin/dvc", *arguments, cwd=self.root, env=self.environment)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def pipelib(self, *arguments: str) -> str:
        done = run_python(self.root / ".venv/bin/pipelib", *arguments, cwd=self.root, env=self.environment)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.dvc(*arguments))

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def text(self, name: str) -> str:
        return (self.root / name).read_text(encoding="utf-8")

    def edit(self, name: str, old: str, new: str) -> None:
        before = self.text(name)
        assert old in before
        (self.root / name).write_text(before.replace(old, new), encoding="utf-8")

    def lock(self) -> dict[str, Any]:
        lock: dict[str, Any] = yaml.safe_load(self.text("dvc.lock"))["stages"]
        return lock

    def changed_stages(self) -> set[str]:
        """Stages that `dvc repro` would run again."""
        return {name.split(":")[-1] for name in self.json("status", "--json")}


def ran(output: str) -> list[str]:
    """The stages that a run of DVC executed."""
    return [name for name in STAGES if f"Running stage '{name}'" in output]


@pytest.fixture(scope="module")
def first_output() -> list[str]:
    """What the first two `dvc repro` printed."""
    return []


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, first_output: list[str]) -> Clone:
    """A clone in which the pipeline ran once, its lock and metrics committed."""
    made = Clone(tmp_path_factory.mktemp("dvc") / "clone")
    first_output.append(made.run([".venv/bin/dvc", "repro", "vocabulary"]))
    made.start_stages_warm()
    first_output.append(made.dvc("repro"))
    made.commit("the baseline")
    return made


def test_a_fresh_clone_runs_all_four_stages_where_nothing_is_activated(clone: Clone, first_output: list[str]) -> None:
    assert [ran(output) for output in first_output] == [list(STAGES[:2]), list(STAGES[2:])]
    assert clone.git("status", "--porcelain") == ""
    tracked = clone.git("ls-files").splitlines()
    assert "dvc.lock" in tracked
    assert {f"metrics/{name}.json" for name in STAGES} <= set(tracked)
    assert not [name for name in tracked if name.split("/")[0] in ("data", "models", "curves", "reports")]
    assert clone.text("reports/evaluation.md").startswith("# Evaluation")


def test_outs_state_and_cache_are_one_file(clone: Clone) -> None:
    for name in ("data/tokens/train_000001.bin", "models/model.safetensors"):
        assert (clone.root / name).stat().st_nlink == 3, name
    assert (clone.root / "metrics/train.json").stat().st_nlink == 1


def test_a_second_repro_runs_nothing(clone: Clone) -> None:
    output = clone.dvc("repro")
    assert ran(output) == []
    assert "Data and pipelines are up to date." in output
    assert clone.changed_stages() == set()
    assert clone.git("status", "--porcelain") == ""


EDITS: dict[str, set[str]] = {
    "src/pipelib/progress.py": set(),
    "src/pipelib/workspace/places.py": set(),
    "src/pipelib/corpus/sources/docs.py": set(),
    "src/pipelib/corpus/sources/local.py": {"download"},
    "src/pipelib/tracking/run.py": set(),
    "src/pipelib/training/params.py": {"train", "finetune"},
    "src/pipelib/finetuning/docs.py": {"finetune"},
    "src/pipelib/evaluation/report.py": {"evaluate"},
    "src/pipelib/model/families/gpt2.py": {"train", "finetune", "evaluate"},
    "src/pipelib/model/decoder.py": {"train", "finetune", "evaluate"},
    "src/pipelib/tokens/encode_corpus.py": {"tokenize"},
    "src/pipelib/vocabulary/bpe.py": {"vocabulary"},
    "src/pipelib/vocabulary/folder.py": {"vocabulary", "tokenize", "train", "finetune", "evaluate"},
    "texts/a.jsonl": {"download"},
    "params.yaml": set(),
}


def test_an_edit_reruns_what_it_can_change(clone: Clone) -> None:
    """All of them at once: DVC names the files for which it would run a stage, and runs it for nothing else.

    Of params.yaml, the logging is changed and the format.
    """
    before = {file: clone.text(file) for file in EDITS}
    for file, text in before.items():
        (clone.root / file).write_text(text + "\n# a comment\n", encoding="utf-8")
    clone.edit("params.yaml", "log_every: 1", "log_every:    2   # more lines")
    named: dict[str, set[str]] = {file: set() for file in EDITS}
    for stage, reasons in clone.json("status", "--json").items():
        for reason in reasons:
            assert reason.keys() == {"changed deps"}
            for file in reason["changed deps"]:
                named["texts/a.jsonl" if file == "texts" else file].add(stage.split(":")[-1])
    assert named == EDITS
    for file, text in before.items():
        (clone.root / file).write_text(text, encoding="utf-8")


def test_a_vocabulary_reruns_what_follows_and_nothing_before(clone: Clone) -> None:
    """GPT-2's is the same for every corpus, so a new corpus changes nothing of it."""
    before = clone.text("params.yaml")
    clone.edit("params.yaml", "source: train", "source: gpt2")
    assert clone.changed_stages() == {"vocabulary"}
    said = clone.dvc("repro", "tokenize")
    assert ran(said) == ["vocabulary", "tokenize"]
    assert clone.changed_stages() == {"train", "finetune", "evaluate"}
    clone.edit("params.yaml", "vocab_size: 300", "vocab_size: 310")  # not used by gpt2, but DVC watches the section
    clone.dvc("repro", "vocabulary")
    assert clone.changed_stages() == {"train", "finetune", "evaluate"}
    clone.edit("params.yaml", "source: gpt2", "source: train")
    assert ran(clone.dvc("repro", "vocabulary")) == ["vocabulary"]  # and not taken out of DVC's run cache
    assert json.loads(clone.text("metrics/vocabulary.json"))["size"] == 310
    (clone.root / "params.yaml").write_text(before, encoding="utf-8")
    assert ran(clone.dvc("repro")) == []  # DVC's run cache has the outs of before
    assert clone.changed_stages() == set()


def docstrings_edited(program: str) -> str:
    """A program with other words in every docstring and under every field, and a comment at its end."""
    lines = program.split("\n")
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1] = lines[node.lineno - 1].replace('"""', '"""Other words. ', 1)
    return "\n".join(lines) + "# and a comment\n"


LINKS = """
import sys, {module}
sys.argv[1:] = []
{module}.main()
print(*({{"torch", "pyarrow", "datasets", "transformers", "mlflow"}} & sys.modules.keys()))
"""


@pytest.mark.long
def test_words_edited_in_every_file_make_nothing_again(clone: Clone) -> None:
    """DVC compares bytes, and starts all stages; each finds what it had finished, and loads nothing that takes seconds."""
    before = clone.lock()
    records = {path: path.stat().st_size for path in (clone.root / ".pipelib/records").rglob("*.jsonl")}
    sources = [path for top in ("src", "stages") for path in (clone.root / top).rglob("*.py")]
    for path in sources:
        path.write_text(docstrings_edited(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert clone.changed_stages() == set(STAGES)
    output = clone.dvc("repro")
    assert ran(output) == list(STAGES)
    assert output.count("its outs are linked again") == len(STAGES)
    after = clone.lock()
    assert {name: after[name]["outs"] for name in STAGES} == {name: before[name]["outs"] for name in STAGES}
    assert {path: path.stat().st_size for path in (clone.root / ".pipelib/records").rglob("*.jsonl")} == records
    for name in STAGES:
        said = clone.run([sys.executable, "-c", LINKS.format(module=f"stages.{name}")])
        assert said.splitlines()[-1] == "", f"{name} loaded {said.splitlines()[-1]}"
    said = clone.pipelib("compare", "HEAD", "workspace")
    assert "ran other code" not in said
    clone.git("checkout", "--quiet", ".")
    assert clone.changed_stages() == set()


TOY_PARAMS = """from dataclasses import dataclass


@dataclass(frozen=True)
class ToyParams:
    size: int
"""


def test_what_is_added_reruns_nothing_for_others(clone: Clone) -> None:
    package = clone.root / "src/pipelib"
    add(clone.root, "src/pipelib/corpus/sources/squares.py")
    add(clone.root, "src/pipelib/training/long_words.py")
    (package / "training/optim/sgd.py").write_bytes((CHECKOUT / "tests/toy_optimizer/sgd.py").read_bytes())
    (package / "toy").mkdir()
    (package / "toy/__init__.py").touch()
    (package / "toy/params.py").write_text(TOY_PARAMS)
    (clone.root / "stages/toy.py").write_text("print('a toy')\n")
    clone.edit(
        "src/pipelib/params.py",
        "from pipelib.training",
        "from pipelib.toy.params import ToyParams\nfrom pipelib.training",
    )
    clone.edit(
        "src/pipelib/params.py", "    logging: LoggingParams\n", "    logging: LoggingParams\n    toy: ToyParams\n"
    )
    clone.edit(
        "src/pipelib/workspace/stages.py", '        Stage(\n            "evaluate"',
        '        Stage("toy", "A toy", ("train",), "", ("toy",), ()),\n        Stage(\n            "evaluate"',
    )  # fmt: skip
    clone.edit(
        "src/pipelib/workspace/places.py", "    @property\n    def reports",
        '    @property\n    def toy(self) -> Path:\n        return self.root / "toy"\n\n    @property\n    def reports',
    )  # fmt: skip
    (clone.root / "params.yaml").write_text(clone.text("params.yaml") + "toy: {size: 1}\n")
    clone.edit(
        "dvc.yaml",
        "  evaluate:\n",
        "  toy: {cmd: 'python -m stages.toy', params: [toy], deps: [models]}\n  evaluate:\n",
    )
    assert clone.changed_stages() == {"toy"}
    assert ran(clone.dvc("repro", "evaluate")) == []
    clone.edit("params.yaml", "source: local", "source: squares")
    assert clone.changed_stages() == {"toy", "download"}
    assert ran(clone.dvc("repro", "--single-item", "download")) == ["download"]
    clone.edit("params.yaml", "optimizer: adamw", "optimizer: sgd")
    assert "train" in clone.changed_stages()
    clone.git("checkout", "--quiet", ".")
    clone.git("clean", "--quiet", "--force", "-d", "src", "stages")
    clone.dvc("checkout")
    assert clone.changed_stages() == set()


def test_a_new_benchmark_starts_two_stages_which_link_what_they_have(clone: Clone) -> None:
    add(clone.root, "src/pipelib/corpus/hub_benchmarks.yaml")
    add(clone.root, "src/pipelib/evaluation/tasks/riddles.yaml")
    line = "      - src/pipelib/evaluation/tasks/sciq.yaml\n"
    clone.edit("dvc.yaml", line, line.replace("sciq", "riddles") + line)
    before = {name: stage["outs"] for name, stage in clone.lock().items()}
    assert clone.changed_stages() == {"download", "evaluate"}
    output = clone.dvc("repro")
    assert ran(output) == ["download", "evaluate"]
    assert output.count("its outs are linked again") == 2
    assert {name: stage["outs"] for name, stage in clone.lock().items()} == before
    clone.git("checkout", "--quiet", ".")
    clone.git("clean", "--quiet", "--force", "-d", "src")
    assert clone.changed_stages() == set()


@pytest.mark.long
def test_a_new_family_reruns_nothing_and_one_message_says_how_to_choose_it(clone: Clone) -> None:
    for folder in ("families", "shapes"):
        code = (CHECKOUT / "tests/toy_family" / folder / "toy.py").read_bytes()
        (clone.root / "src/pipelib/model" / folder / "toy.py").write_bytes(code)
    assert clone.changed_stages() == set()
    clone.commit("a family")
    said = clone.fails([".venv/bin/dvc", "exp", "run", "-S", "model.architecture=toy"])
    message = (
        "model.architecture: toy needs other keys (missing: width; not needed: n_layer, n_head, n_embd); change them"
    )
    assert said.count(message) == 1
    (command,) = re.findall(r"`\.venv/bin/dvc (exp run .*?)`", said)
    assert command == (
        "exp run -S model.architecture=toy -S '+model.width=WIDTH' "
        "-S '~model.n_layer' -S '~model.n_head' -S '~model.n_embd'"
    )
    clone.git("checkout", "--quiet", "params.yaml")
    typed = shlex.split(command.replace("WIDTH", "16"))
    assert ran(clone.dvc(*typed)) == ["train", "finetune", "evaluate"]
    assert "# Toy, " in clone.text("models/README.md")
    deps = {dep["path"] for dep in clone.lock()["train"]["deps"]}
    assert "src/pipelib/model/families/toy.py" in deps
    assert "src/pipelib/model/families/gpt2.py" not in deps
    clone.git("reset", "--quiet", "--hard", "HEAD~1")
    clone.dvc("checkout")
    assert clone.changed_stages() == set()


# ---- Experiments -----------------------------------------------------------------------------------------------------


def test_an_experiment_with_another_learning_rate_trains_with_that_number(clone: Clone) -> None:
    output = clone.dvc("exp", "run", "--name", "small-rate", "--set-param", "train.max_lr=6e-5")
    assert ran(output) == ["train", "finetune", "evaluate"]
    assert "max_lr: 6e-05" in clone.text("params.yaml")
    assert clone.lock()["train"]["params"]["params.yaml"]["train"]["max_lr"] in (6e-5, "6e-05")  # PyYAML's reading
    assert "6e-05" in clone.text("models/README.md")
    states = [json.loads(path.read_bytes()) for path in (clone.root / ".pipelib/train").glob("*/meta.json")]
    rates_of_states = {state["inputs"]["train"]["max_lr"] for state in states}
    assert rates_of_states == {PARAMS["train"]["max_lr"], 6e-5}
    rates = [float(row["learning_rate"]) for row in csv.DictReader(io.StringIO(clone.text("curves/train.csv")))]
    assert max(rates) == pytest.approx(6e-5)


def test_diffs_say_what_changed(clone: Clone) -> None:
    params = clone.json("params", "diff", "--json")
    assert list(params) == ["params.yaml"]
    assert {key: (float(change["old"]), float(change["new"])) for key, change in params["params.yaml"].items()} == {
        "train.max_lr": (PARAMS["train"]["max_lr"], 6e-5)
    }
    metrics = clone.json("metrics", "diff", "--json")
    assert {"metrics/train.json", "metrics/evaluate.json"} <= set(metrics)
    assert not {"metrics/download.json", "metrics/tokenize.json"} & set(metrics)
    change = metrics["metrics/evaluate.json"]["val_loss"]
    assert change["new"] > change["old"], "a rate a hundred times smaller learns less in forty steps"
    table = clone.dvc("metrics", "diff", "--md")
    assert "| metrics/evaluate.json" in table
    assert "val_loss" in table


def test_what_differs_in_every_run_does_not_bury_what_changed(clone: Clone) -> None:
    changed = clone.json("metrics", "diff", "--json")
    assert not [name for name in changed if "speed" in name]
    assert (clone.root / "metrics/speed/train.csv").read_text().startswith("step,tokens_per_second,")
    speed = json.loads(clone.text("metrics/speed/train.json"))
    assert speed["device_hours"] > 0
    assert len(speed["git_commit"]) == 40


def test_compare_reads_both_from_git_and_the_cache(clone: Clone) -> None:
    said = clone.pipelib("compare", "main", "small-rate", "--md")
    assert f"| train.max_lr | {PARAMS['train']['max_lr']} | 6e-05 |" in said
    (loss,) = (line for line in said.splitlines() if line.startswith("| evaluate val_loss |"))
    assert " to " in loss, "both evaluated the same items, so there is an interval"


def test_plots_show_the_curves_of_both(clone: Clone) -> None:
    shown = clone.json("plots", "show", "--json", "--out", "../plots")["data"]
    assert {name.split(":")[-1] for name in shown} == {
        "loss", "hellaswag", "learning_rate", "grad_norm", "update_sizes", "throughput"
    }  # fmt: skip
    (loss,) = (value for name, value in shown.items() if name.endswith("loss"))
    points = json.loads(loss[0]["content"]) if isinstance(loss[0]["content"], str) else loss[0]["content"]
    assert points
    diff = clone.json("plots", "diff", "HEAD", "workspace", "--json", "--out", "../plots")["data"]
    revisions = {revision for entries in diff.values() for entry in entries for revision in entry["revisions"]}
    assert revisions == {"HEAD", "workspace"}


def test_the_page_of_the_plots_loads_nothing(clone: Clone) -> None:
    assert "dvc plots works without a network now" in clone.pipelib("plots-page")
    clone.dvc("plots", "diff", "HEAD", "workspace", "--out", "../plots")
    page = clone.text("../plots/index.html")
    assert page.count("vegaEmbed('#") == 6, "one of them has no data, and the page leaves it out"
    assert "<script src" not in page
    assert "dots: validation" in page, "our template of the loss"
    assert not clone.git("status", "--porcelain", ".dvc"), "the page and its setting are this clone's own"
    begins = [match.end() for match in re.finditer("var spec = ", page)]
    specs = [spec for begin in begins if (spec := json.JSONDecoder().raw_decode(page, begin)[0])]
    drawn = [vl_convert.vegalite_to_svg(spec).count('aria-roledescription="line mark"') for spec in specs]
    assert len(drawn) == 5
    assert min(drawn) >= 2, "a line for each of two runs"
    assert drawn[0] == 4, "training and validation of two runs"


@pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
def test_a_browser_draws_the_page_of_the_plots(clone: Clone, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.open((clone.root.parent / "plots/index.html").as_uri())
        browser.wait_for_text(
            "Loss of training and validation", "Learning rate", "Gradient norm", "tokens/s", "workspace", "HEAD"
        )
        assert browser.evaluate("performance.getEntriesByType('resource').length") == 0, "it loaded something"
        assert browser.evaluate("document.querySelectorAll('.vega-embed').length") == 5, "HellaSwag has no data"


def test_exp_show_has_a_row_for_the_baseline_and_the_experiment(clone: Clone) -> None:
    rows = {
        row["Experiment"] or row["rev"]: row for row in csv.DictReader(io.StringIO(clone.dvc("exp", "show", "--csv")))
    }
    assert {"main", "small-rate"} <= set(rows)
    assert float(rows["main"]["train.max_lr"]) == PARAMS["train"]["max_lr"]
    assert float(rows["small-rate"]["train.max_lr"]) == 6e-5
    column = next(name for name in rows["main"] if name.endswith("evaluate.json:val_loss"))
    assert float(rows["small-rate"][column]) > float(rows["main"][column])


def test_going_back_is_a_cache_hit(clone: Clone) -> None:
    clone.git("checkout", "--quiet", "params.yaml")
    output = clone.dvc("repro")
    assert ran(output) == []
    for name in ("train", "finetune", "evaluate"):
        assert f"Stage '{name}' is cached - skipping run" in output
    assert clone.git("status", "--porcelain") == "", "the baseline's lock and metrics are back"


def test_a_damaged_shard_is_made_again_without_tokenizing_anything(clone: Clone) -> None:
    shard = clone.root / "data/tokens/train_000001.bin"
    content = shard.read_bytes()
    shard.chmod(0o644)
    with shard.open("r+b") as file:  # one inode with DVC's object and the finished state
        file.seek(2000)
        file.write(bytes([content[2000] ^ 1]))
    said = clone.pipelib("verify", "data/tokens", "--repair")
    assert "removed data/tokens/train_000001.bin" in said
    assert ran(clone.dvc("repro")) == ["tokenize"]
    assert shard.read_bytes() == content
    speed = json.loads(clone.text("metrics/speed/tokenize.json"))
    assert speed["units"] > 0
    assert speed["units_encoded"] == 0
    clone.git("checkout", "--quiet", "dvc.lock", "metrics")


def experiments(clone: Clone) -> set[str]:
    """The experiments that have ended well, as DVC keeps them in git; `exec` is for those that run."""
    refs = clone.git("for-each-ref", "--format=%(refname)", "refs/exps").split()
    return {ref for ref in refs if "/exec/" not in ref and "stash" not in ref}


@pytest.mark.long
def test_a_queued_sweep_runs_the_code_it_was_queued_with(clone: Clone) -> None:
    clone.dvc("exp", "run", "--queue", "--set-param", "evaluate.batch_tokens=choice(1024,2048)")
    clone.edit("src/pipelib/evaluation/report.py", 'Heading("Evaluation", 1)', 'Heading("Edited after queueing", 1)')
    clone.activate()  # `dvc queue start` starts its worker as `dvc`, by that name
    before = experiments(clone)
    clone.dvc("queue", "start")
    deadline = time.monotonic() + 200
    while len(experiments(clone) - before) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)  # git is asked, since `dvc queue status` takes a second of a core
    for _ in range(30):
        status = clone.dvc("queue", "status")
        if status.count("Success") == 2:  # a task that is between two states is in no line
            break
        time.sleep(1)
    assert status.count("Success") == 2, status
    rows = list(csv.DictReader(io.StringIO(clone.dvc("exp", "show", "--csv"))))
    swept = {row["Experiment"]: int(float(row["evaluate.batch_tokens"])) for row in rows if row["Experiment"]}
    swept = {name: tokens for name, tokens in swept.items() if tokens != PARAMS["evaluate"]["batch_tokens"]}
    assert sorted(swept.values()) == [1024, 2048]
    name = next(name for name, tokens in swept.items() if tokens == 1024)
    changed = clone.json("params", "diff", "main", name, "--json")["params.yaml"]
    assert changed == {"evaluate.batch_tokens": {"old": 512, "new": 1024, "diff": 512}}
    report = clone.root.parent / "queued.md"
    clone.dvc("get", ".", "reports/evaluation.md", "--rev", name, "--out", str(report))
    assert report.read_text(encoding="utf-8").startswith("# Evaluation\n")
    clone.git("checkout", "--quiet", "src")


@pytest.mark.long
def test_an_experiment_in_a_copy_leaves_the_workspace_alone_and_can_be_applied_and_branched(clone: Clone) -> None:
    output = clone.dvc("exp", "run", "--temp", "--name", "apart", "--set-param", "evaluate.batch_tokens=256")
    assert ran(output) == ["evaluate"]
    assert clone.git("status", "--porcelain") == ""
    clone.dvc("exp", "branch", "apart", "kept")
    assert "batch_tokens: 256" in clone.git("show", "kept:params.yaml")
    clone.dvc("exp", "apply", "apart")
    assert "batch_tokens: 256" in clone.text("params.yaml")
    assert clone.changed_stages() == set(), "the reports came with it"
    clone.git("reset", "--quiet", "--hard")
    clone.dvc("checkout", "--quiet")


@pytest.mark.long
def test_an_experiment_in_a_copy_refuses_to_leave_text_behind(clone: Clone) -> None:
    """Only evaluate has anything to do, and the text would go missing in download, which DVC skips."""
    write_jsonl(clone.root / "texts/more.jsonl", make_texts(30, seed=1))
    experiment = ["exp", "run", "--temp", "--set-param", "evaluate.batch_tokens=768"]
    said = clone.fails([".venv/bin/dvc", *experiment])
    assert (
        "evaluate: this experiment's copy of the repository lacks 1 file of texts that neither git nor DVC tracked"
        in said
    )
    assert "`git add texts/more.jsonl`" in said
    clone.dvc("add", "--quiet", "texts/more.jsonl")
    clone.git("add", "texts")
    assert ran(clone.dvc(*experiment, "--name", "more", "download")) == ["download"]
    (ref,) = clone.git("for-each-ref", "--format=%(refname)", "refs/exps/*/*/more").split()
    assert json.loads(clone.git("show", f"{ref}:metrics/download.json"))["documents"] == 100
    clone.git("reset", "--quiet", "--hard")
    (clone.root / "texts/more.jsonl").unlink()
    assert clone.changed_stages() == set()


def test_applying_an_experiment_drops_edits_as_the_page_says(clone: Clone) -> None:
    name = next(
        row["Experiment"] for row in csv.DictReader(io.StringIO(clone.dvc("exp", "show", "--csv"))) if row["Experiment"]
    )
    before = clone.text("Makefile")
    clone.edit("Makefile", "RUNS ?= 200", "RUNS ?= 201")
    clone.dvc("exp", "apply", name)
    assert clone.text("Makefile") == before
    clone.git("checkout", "refs/exps/apply/stash", "--", "Makefile")  # how experiments.md gets it back
    assert "RUNS ?= 201" in clone.text("Makefile")
    clone.git("reset", "--quiet", "--hard")
    clone.dvc("checkout", "--quiet")


def test_the_graph_can_be_drawn_by_github(clone: Clone) -> None:
    graph = clone.dvc("dag", "--mermaid")
    assert graph.startswith("flowchart TD")
    assert {f'["{name}"]' for name in STAGES} <= {f"[{part.split(']')[0]}]" for part in graph.split("[")[1:]}


# ---- A remote --------------------------------------------------------------------------------------------------------


def test_a_fresh_clone_with_a_remote_needs_no_data_and_evaluates_without_training_shards(clone: Clone) -> None:
    recipe = clone.run(["make", "--dry-run", "--old-file=.venv/ready", "remote", "REMOTE=../remote"])
    for line in recipe.splitlines():
        if line.startswith(".venv/bin/dvc"):  # not what would set up an environment
            clone.dvc(*line.split()[1:])
    there = Clone.of(clone)
    assert not (there.root / "data").exists()
    output = there.dvc("repro", "--pull", "--allow-missing")
    assert ran(output) == []
    assert not (there.root / "models").exists(), "nothing was needed, so nothing was fetched"
    assert there.git("status", "--porcelain") == ""
    there.edit("params.yaml", "batch_tokens: 512", "batch_tokens: 640")
    assert ran(there.dvc("repro", "--pull", "--allow-missing")) == ["evaluate"]
    fetched = {path.name for path in (there.root / "data").rglob("*") if path.is_file()}
    assert {"val_000000.bin", "unigram_counts.npy", "manifest.json", "completion.jsonl"} <= fetched
    assert (there.root / "models/model.safetensors").exists()
    assert not [name for name in fetched if name.startswith("train_") or name.endswith(".parquet")]
