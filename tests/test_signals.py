"""Signals that ask to stop, at every phase of a stage: no traceback, nothing half done, and the next run resumes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpus import make_texts, write_jsonl, write_raw_files
from small_params import write_params
from small_project import Project, without_pythonpath
from small_vocabulary import write_small_vocabulary
from warm_python import run_python

import pipelib
from pipelib import processes
from pipelib.files import write_json
from pipelib.pool import Pool
from pipelib.processes import STOP_SIGNALS, WARNING_SIGNALS, on_first_signal, signals_blocked
from pipelib.stage import run_stage

SIGNALS = (*STOP_SIGNALS, *WARNING_SIGNALS)
SEED = int(os.environ.get("PIPELIB_TEST_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(autouse=True)
def handlers_are_left_as_they_were() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


# ---- One process -----------------------------------------------------------------------------------------------------


@given(numbers=st.lists(st.sampled_from(SIGNALS), min_size=1, max_size=6), orphaned=st.booleans())
def test_the_first_signal_acts_and_only_a_second_order_ends_the_process(
    numbers: list[signal.Signals], orphaned: bool
) -> None:
    acted: list[int] = []
    ended: list[int] = []
    with pytest.MonkeyPatch.context() as patch, on_first_signal(acted.append):
        patch.setattr(processes, "die_by_signal", ended.append)
        if orphaned:
            patch.setattr(os, "getppid", lambda: 1)
        for number in numbers:
            signal.raise_signal(number)
    assert acted == numbers[:1]
    orders = [number for number in numbers if number in STOP_SIGNALS][1:]
    assert ended == [number for number in orders if not (orphaned and number == signal.SIGTERM)]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_ignored_hangup_and_ctrl_c_stay_ignored(number: signal.Signals) -> None:
    """Of nohup and of a shell's background jobs. A script ignores Slurm's SIGUSR1 to protect DVC, and not the stage."""
    before, acted = signal.signal(number, signal.SIG_IGN), list[int]()
    try:
        with on_first_signal(acted.append):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert acted == ([] if number in (signal.SIGHUP, signal.SIGINT) else [number])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_stage_says_by_what_it_was_stopped(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelib.stage.STOP_SECONDS", 3600.0)  # after which this process would end, tests and all
    with pytest.raises(SystemExit) as caught:
        run_stage("tokenize", lambda: signal.raise_signal(number))
    assert caught.value.code == 128 + number
    said = f"tokenize: stopped by {number.name}; run dvc repro to resume from here\n"
    assert capsys.readouterr().err.replace(".venv/bin/", "") == said


def start(program: str, **options: Any) -> "subprocess.Popen[bytes]":
    """A program in a Python of its own that imports this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pipelib.__file__).parents[1])}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, **options)


def test_a_stage_that_cannot_end_is_ended(tmp_path: Path) -> None:
    program = """
import signal, threading
from pipelib import stage
stage.STOP_SECONDS = 0.2

def main():
    try:
        signal.raise_signal(signal.SIGUSR1)
    finally:
        threading.Event().wait()

stage.run_stage("tokenize", main)
"""
    assert start(program, cwd=tmp_path).wait(60) == 128 + signal.SIGUSR1


def test_what_is_printed_to_nobody_is_no_error() -> None:
    program = """
import sys
from pipelib.processes import outlive_terminal
outlive_terminal()
input()
for stream in (sys.stdout, sys.stderr) * 2:
    print("é" * 99_999, file=stream, flush=True)
sys.exit(7)
"""
    process = start(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 7


def nothing() -> None: ...


def blocked_signals(_: int) -> set[int]:
    return {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def test_workers_leave_signals_to_the_one_that_waits_for_them() -> None:
    with Pool(2, nothing) as pool:
        found = [blocked for _, blocked in pool.run(blocked_signals, [(1,), (2,), (3,)])]
    assert all(blocked >= set(SIGNALS) for blocked in found)
    assert not blocked_signals(0) & set(SIGNALS)


def test_signals_that_are_held_back_arrive_later() -> None:
    happened: list[object] = []
    with on_first_signal(happened.append):
        with signals_blocked():
            signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
            happened.append("held back")
        happened.append("over")
    assert happened == ["held back", signal.SIGHUP, "over"]


@pytest.mark.parametrize("names", [{}, {"RANK": "3"}, {"PET_NNODES": "4", "PET_LOCAL_ADDR": "a", "MASTER_ADDR": "b"}])
def test_ranks_of_a_job_around_this_one_are_forgotten(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    kept = {name: value for name, value in os.environ.items() if name not in names}
    processes.clear_rank_variables()
    assert dict(os.environ) == kept | ({"PET_LOCAL_ADDR": "a"} if "PET_LOCAL_ADDR" in names else {})


# ---- Every phase of a stage ------------------------------------------------------------------------------------------

WATCHED = """
import os, runpy, signal, sys
at, number = map(int, os.environ.pop("TEST_SIGNAL").split())
count = 0

def look(event, arguments):
    global count
    if event in ("import", "open", "os.rename", "os.remove", "os.mkdir"):
        count += 1
        if count == at:
            os.kill(os.getpid(), number)

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the stage begins; before that, Python makes an error of it
sys.addaudithook(look)
if not at:
    import atexit
    atexit.register(lambda: print("events:", count))
stage = sys.argv.pop()
sys.argv[0] = "-m"  # as `python -m` has it then
runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
"""
"""A stage that signals itself at its n-th import or file operation, from its start to its end."""


def run_watched(project: Project, stage: str, signal_at: str) -> "subprocess.CompletedProcess[str]":
    environment = without_pythonpath({"PIPELIB_WORKERS": "1", "TEST_SIGNAL": signal_at})
    return run_python("-m", "watched", stage, cwd=project.root, env=environment)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a corpus and nothing made of it; Python has compiled its files."""
    project = Project.make(tmp_path_factory.mktemp("signals") / "project")
    (project.root / "watched.py").write_text(WATCHED)
    write_params(project.root, download__benchmarks=[], download__benchmark_documents=0)
    write_json(project.root / "data/benchmarks/manifest.json", {})
    write_jsonl(project.root / "texts/a.jsonl", make_texts(70))
    return project


def outs(project: Project) -> dict[str, bytes]:
    """Every byte of what the stages made, less their speed."""
    names = (name for name in project.files() if not name.startswith("metrics/speed"))
    return {name: (project.root / name).read_bytes() for name in names}


@pytest.mark.random
@pytest.mark.parametrize(
    ("stages", "times"),
    [
        (["tokenize"], 4),
        pytest.param(["download", "vocabulary", "tokenize", "train", "evaluate"], 12, marks=pytest.mark.long),
    ],
    ids=["tokenize", "all"],
)
def test_signalled_at_any_phase_it_ends_quietly_and_the_next_run_resumes(
    source: Project, tmp_path: Path, stages: list[str], times: int
) -> None:
    chance = random.Random(SEED)
    project = Project(tmp_path / "project")
    shutil.copytree(source.root, project.root)
    if "download" not in stages:
        write_raw_files(project.root / "data/raw", [make_texts(60), make_texts(40, seed=1)])
        write_small_vocabulary(project.root / "data/vocabulary")
    for name in stages:
        before = outs(project)
        done = run_watched(project, name, "0 0")
        assert done.returncode == 0, done.stderr
        events, expected = int(done.stdout.rpartition("events: ")[2]), outs(project)
        assert expected.items() > before.items()
        forget(project, name, before)
        for _ in range(times):
            at, number = chance.randrange(1, events), chance.choice(SIGNALS)
            done = run_watched(project, name, f"{at} {number}")
            where = f"{name}: {number.name} at event {at} of {events} (PIPELIB_TEST_SEED={SEED})\n{done.stderr}"
            assert done.returncode in (-number, 128 + number, 1 if name == "train" else 0, 0), where
            assert "Traceback" not in done.stderr, where
            assert {key: outs(project).get(key) for key in before} == before, where
        project.runs(name)
        assert outs(project) == expected


def forget(project: Project, stage: str, outs_before: dict[str, bytes]) -> None:
    """Undo a stage."""
    shutil.rmtree(project.root / ".pipelib" / stage)
    for name in outs(project).keys() - outs_before.keys():
        (project.root / name).unlink()
