"""Tokenization on other machines: jobs of Slurm and a cluster of Ray make the bytes that this machine makes."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import make_texts, write_jsonl, write_raw_files
from small_project import CHECKOUT, Project
from small_vocabulary import TOKENIZER, write_small_vocabulary
from warm_python import write_python

from pipelib.errors import UserError
from pipelib.files import files_under, read_json, sha256_file, write_json
from pipelib.stage import Build
from pipelib.tokens.encode_corpus import encode_corpus
from pipelib.tokens.encoding import package_versions, require_same_packages
from pipelib.tokens.executors import slurm
from pipelib.tokens.params import TokenizeParams
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.choice import Vocabulary
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer

FILES: list[list[str | None]] = [[*make_texts(2000)], [*make_texts(500, seed=1)], [None, *make_texts(300, seed=2), ""]]


@pytest.fixture
def raw(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of several units, and the small vocabulary, in the working directory."""
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(here / "state"))
    write_small_vocabulary(here / "data/vocabulary")
    return write_raw_files(here / "data/raw", FILES, row_group_rows=100)


def tokenize(name: str, raw: Path, tokenizer: Tokenizer = TOKENIZER) -> tuple[dict[str, str], Any]:
    """The shards by their hashes, and the speed, of a run that finds no units of others."""
    folder = Path(name)
    for part in ("outs", "work"):
        (folder / part).mkdir(parents=True)
    build = Build(folder / "outs", folder / "work", NullRun(), {"folder": name}, False)
    _, speed = encode_corpus(build, raw, TokenizeParams(100_000, "none"), 0, Vocabulary(tokenizer, None))
    made = folder / "outs/data/tokens"
    return {path.name: sha256_file(path) for path in files_under(made)}, speed


def test_an_unknown_executor_is_refused(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_EXECUTOR", "spark")
    with pytest.raises(UserError, match=r"PIPELIB_EXECUTOR=spark is not a known executor.*use local, ray, slurm"):
        tokenize("made", raw)


def test_ray_that_is_missing_is_named(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_EXECUTOR", "ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"PIPELIB_EXECUTOR=ray needs the package ray.*install"):
        tokenize("made", raw)


def test_a_machine_with_other_packages_encodes_nothing() -> None:
    require_same_packages(package_versions())
    other = {**package_versions(), "tiktoken": "0.1"}
    with pytest.raises(
        UserError, match=r"has other packages than the machine that runs the stage \(tiktoken \d.*install"
    ):
        require_same_packages(other)


# ---- Ray -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two machines of Ray with one CPU each, as far as Ray is concerned: processes and object stores of their own."""
    pytest.importorskip("ray", reason="the package ray is not installed")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 400 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(num_cpus=1, object_store_memory=400 << 20)
    monkeypatch.setenv("PIPELIB_EXECUTOR", "ray")
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@pytest.mark.long
@pytest.mark.parametrize("tokenizer", [TOKENIZER, GPT2_TOKENIZER], ids=["own", "gpt2"])
def test_ray_makes_the_same_bytes(
    raw: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any, tokenizer: Tokenizer
) -> None:
    remote, speed = tokenize("remote", raw, tokenizer)
    assert speed["units_encoded"] == speed["units"] > 4
    monkeypatch.setenv("PIPELIB_EXECUTOR", "local")
    assert tokenize("local", raw, tokenizer)[0] == remote
    assert len(cluster.list_all_nodes()) == 2


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def encoding() -> list[psutil.Process]:
    """The workers of this process's cluster that are at a unit."""
    return [
        process for process in psutil.Process().children(recursive=True) if process.name().startswith("ray::encode")
    ]


def units_there() -> int:
    return len(list(Path("state/units").rglob("*.unit")))


@pytest.mark.long
@pytest.mark.parametrize("victim", ["node", "worker"])
def test_units_of_a_lost_machine_are_encoded_by_others(
    raw: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any, victim: str
) -> None:
    def kill() -> None:
        until(lambda: units_there() >= 2)
        if victim == "node":
            cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        else:
            until(lambda: bool(encoding()))
            encoding()[0].kill()
        lost.append(units_there())

    lost: list[int] = []
    killer = threading.Thread(target=kill)
    killer.start()
    remote, speed = tokenize("remote", raw)
    killer.join()
    assert lost[0] < speed["units"], "it was killed too late to lose anything"
    monkeypatch.setenv("PIPELIB_EXECUTOR", "local")
    assert tokenize("local", raw)[0] == remote


DRIVER = """
from pathlib import Path
from test_tokens_executors import tokenize
tokenize("{name}", Path("data/raw"))
"""


def start_driver(name: str) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT / 'src'}:{Path(__file__).parent}"}
    return subprocess.Popen([sys.executable, "-c", DRIVER.format(name=name)], env=environment)


@pytest.mark.long
def test_after_the_driver_was_killed_only_what_is_missing_is_encoded(
    raw: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any
) -> None:
    assert cluster
    driver = start_driver("remote")
    until(lambda: units_there() >= 3)
    driver.kill()
    driver.wait()
    there = units_there()
    shutil.rmtree("remote")
    remote, speed = tokenize("remote", raw)
    assert 0 < speed["units_encoded"] <= speed["units"] - there
    monkeypatch.setenv("PIPELIB_EXECUTOR", "local")
    assert tokenize("local", raw)[0] == remote


@pytest.mark.long
def test_what_ray_cannot_do_is_said_in_one_line(raw: Path, monkeypatch: pytest.MonkeyPatch, cluster: Any) -> None:
    import ray

    from pipelib.tokens.executors import ray as executor

    with monkeypatch.context() as patch:
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 0.0})
        with pytest.raises(UserError, match=r"the cluster of Ray has no CPU.*ray start --address"):
            tokenize("no-cpu", raw)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "UNIT_BYTES", 101 << 20)
        with pytest.raises(UserError, match=r"the object store of Ray has .* on this machine.*--object-store-memory"):
            tokenize("no-room", raw)
    cluster.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(UserError, match=r"could not join a cluster.*`ray start --head`.*RAY_ADDRESS"):
        tokenize("no-cluster", raw)


def spoil(raw: Path) -> None:
    """Make a row of the corpus one that is not UTF-8, as the manifest has it."""
    path = raw / "001_00000.parquet"
    array = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": array}), path)
    manifest = read_json(raw / "manifest.json")
    manifest["files"][1] |= {"bytes": path.stat().st_size, "rows": 2, "sha256": sha256_file(path)}
    write_json(raw / "manifest.json", manifest)


@pytest.mark.long
def test_ray_names_a_row_that_is_not_text(raw: Path, cluster: Any) -> None:
    assert cluster
    spoil(raw)
    with pytest.raises(UserError, match=r"001_00000\.parquet, row 2: the text is not UTF-8"):
        tokenize("remote", raw)


# ---- Slurm -----------------------------------------------------------------------------------------------------------

STAND_IN = """#!{python} -IS
import os, subprocess, sys
options = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
assert "PIPELIB_PARENT" not in os.environ
for index in range(int(options["array"].partition("-")[2]) + 1):
    environment = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(index)}}
    with open(options["output"].replace("%a", str(index)), "w") as log:
        {run}
print("7;cluster")
"""
RUN = (
    'subprocess.run(["sh", "-c", options["wrap"].replace(sys.executable, "python")], '
    'cwd=options["chdir"], env=environment, stdout=log, stderr=log)'
)
"""A job that need not import what takes seconds."""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout that is ready for the tokenize stage."""
    root = tmp_path_factory.mktemp("ready") / "checkout"
    made = Project.make(root)
    write_jsonl(root / "texts/a.jsonl", make_texts(4000, words=50))
    for stage in ("download", "vocabulary"):
        made.runs(stage)
    return root


@pytest.fixture
def project(tmp_path: Path, ready: Path) -> Project:
    """A copy of it."""
    return Project(shutil.copytree(ready, tmp_path / "checkout", symlinks=True))


def with_slurm(root: Path, run: str = RUN) -> dict[str, str]:
    """The environment of a run whose `sbatch` is a stand-in: it runs the jobs here, one after the other."""
    note = f'#!/bin/sh\necho "$0 $*" >> {root}/asked\n'
    programs = {"sbatch": STAND_IN.format(python=sys.executable, run=run), "scancel": note, "squeue": note}
    for name, content in programs.items():
        program = root / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(content)
        program.chmod(0o755)
    write_python(root / "bin/python")
    path = f"{root}/bin:{os.environ['PATH']}"
    return {"PIPELIB_EXECUTOR": "slurm", "PIPELIB_SLURM_JOBS": "3", "PIPELIB_SLURM_CPUS": "1", "PATH": path}


def shards(project: Project) -> dict[str, str]:
    made = project.root / "data/tokens"
    return {path.name: sha256_file(path) for path in files_under(made)}


def local_shards(project: Project) -> dict[str, str]:
    """The shards of a run without Slurm that finds nothing of the earlier one."""
    shutil.rmtree(project.root / ".pipelib/units")
    shutil.rmtree(project.root / ".pipelib/tokenize")
    shutil.rmtree(project.root / "data/tokens")
    project.runs("tokenize")
    return shards(project)


def test_jobs_make_the_same_bytes(project: Project) -> None:
    project.runs("tokenize", **with_slurm(project.root))
    speed = read_json(project.root / "metrics/speed/tokenize.json")
    assert speed["units_encoded"] == speed["units"] > 2
    assert len(list((project.root / ".pipelib/slurm").rglob("share-*.log"))) == 3
    assert f"{project.root}/bin/scancel 7\n" in (project.root / "asked").read_text()
    made = shards(project)
    shutil.rmtree(project.root / ".pipelib/tokenize")
    shutil.rmtree(project.root / "data/tokens")
    project.runs("tokenize", **with_slurm(project.root, "sys.exit('all units are there, so there is no job')"))
    assert shards(project) == made
    assert local_shards(project) == made


@pytest.mark.parametrize(
    "end",
    [
        "continue",
        "log.write('tokenize: stopped by SIGTERM; run dvc repro to resume\\nthe share ended with status 143\\n'); continue",
        "log.write('tokenize: a worker was killed; so\\nthe share ended with status 1\\n'); continue",
    ],
    ids=["killed", "time is up", "out of memory"],
)
@pytest.mark.long
def test_what_a_dead_job_left_gets_another_one(project: Project, end: str) -> None:
    """The second share dies the first time."""
    died = project.root / "died"
    first = f"index == 1 and not os.path.exists({str(died)!r})"
    run = f"if {first}:\n            open({str(died)!r}, 'w')\n            {end}\n        {RUN}"
    done = project.stage("tokenize", **with_slurm(project.root, run))
    assert done.returncode == 0, done.stderr
    assert "the jobs of round 1 have ended, and" in done.stderr
    made = shards(project)
    assert local_shards(project) == made


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("pass", ("units are still missing after jobs were submitted 3 times", "run dvc repro again")),
        (
            "sys.exit('sbatch: error: invalid account')",
            ("`sbatch` did not submit the jobs (sbatch: error: invalid account)", "SBATCH_ACCOUNT"),
        ),
        (
            "log.write('tokenize: data/raw/a.parquet, row 7: the text is not UTF-8; fix it.\\nthe share ended with status 1\\n')",
            ("data/raw/a.parquet, row 7: the text is not UTF-8; fix it.",),
        ),
    ],
    ids=["jobs do nothing", "refused", "bad row"],
)
def test_jobs_that_do_not_help_end_in_one_message(
    raw: Path, monkeypatch: pytest.MonkeyPatch, run: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setattr(slurm, "POLL_SECONDS", 0.01)
    for name, value in with_slurm(Path.cwd(), run).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as raised:
        tokenize("made", raw)
    for word in words:
        assert word in str(raised.value)


def test_without_slurm_no_job_is_submitted(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_EXECUTOR", "slurm")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"found no `sbatch`.*unset PIPELIB_EXECUTOR"):
        tokenize("made", raw)


@pytest.mark.long
def test_a_real_slurm_makes_the_same_bytes_and_survives_its_driver(project: Project) -> None:
    if not (shutil.which("sinfo") and subprocess.getoutput("sinfo --noheader --states=idle")):
        pytest.skip("no Slurm with an idle machine is here")
    environment = {**os.environ, "PIPELIB_EXECUTOR": "slurm", "PIPELIB_SLURM_JOBS": "3", "PIPELIB_SLURM_CPUS": "1"}
    driver = subprocess.Popen([sys.executable, "-m", "stages.tokenize"], cwd=project.root, env=environment)
    until(lambda: bool(subprocess.getoutput("squeue --noheader")))
    driver.kill()
    driver.wait()
    project.runs("tokenize", **environment)
    speed = read_json(project.root / "metrics/speed/tokenize.json")
    assert 0 < speed["units_encoded"] <= speed["units"]
    made = shards(project)
    assert local_shards(project) == made
