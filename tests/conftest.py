"""What all tests share: an environment that nobody set up, and folders to work in."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_run import write_tokens
from small_vocabulary import TOKENIZER
from warm_python import run_python

from pipelib.training import determinism
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace import dvc

pytest_plugins = ("small_tracking",)


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """No variable of this shell that changes what the pipeline does, except what sets the size and the data of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("PIPELIB_", "DVC_", "MLFLOW_")) and not name.startswith("PIPELIB_TEST_"):
                patch.delenv(name)
        # What Python compiles is kept, and copied with the sources: else each of a thousand processes compiles all of them.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setattr(sys, "dont_write_bytecode", False)
        # One thread for stages, as `one_thread` has for the rest.
        patch.setenv("PIPELIB_THREADS", "1")
        # Tests compare the bits of a CPU; bench/gpu.py is for GPUs.
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Sums on a CPU depend on the number of threads, and with two pytest workers more of them are slower.

    For every test, since commands set the number that is right for them.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def trainings_collect_what_is_young() -> Iterator[None]:
    """Before it starts, a training looks for garbage: in all that the tests have imported, that takes as long as its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(determinism, "gc", SimpleNamespace(**{**vars(gc), "collect": lambda: gc.collect(1)}))
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_start_dvc_warm() -> Iterator[None]:
    """Many commands ask DVC where its cache is, and DVC takes a second to import."""

    def run(command: Sequence[str], *, cwd: Path, **_: object) -> "subprocess.CompletedProcess[str]":
        return run_python(*command[1:], cwd=cwd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvc, "subprocess", SimpleNamespace(run=run))
        yield


@pytest.fixture(scope="session", autouse=True)
def signals_count() -> None:
    """Trainings ignore SIGHUP and Ctrl-C where their parent does, under nohup or in the background; here they must not."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory, where the state goes too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a small training finds its tokens."""
    write_tokens(tmp_path / "tokens")
    return tmp_path


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small vocabulary with the tokens of the chat template."""
    return TOKENIZER


@pytest.fixture(scope="session")
def vocabulary_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder for tests that tokenize, so that the vocabulary is laid out once."""
    return tmp_path_factory.mktemp("state")


LONGEST = ("test_dvc.py", "test_kill.py", "test_tokens_encode_corpus.py", "test_tokens_units.py")
"""A file stays on one worker, so the longest ones start first: else the last one would keep one core waiting."""
SLOW = (
    "bench", "cli_chat", "cli_compare", "cli_doctor", "cli_plan", "cli_publish", "cli_sample", "cli_verify",
    "corpus_benchmarks", "corpus_docs", "corpus_experiment_copy", "corpus_hub", "corpus_hub_answers", "corpus_hub_stage",
    "corpus_kinds", "corpus_local", "corpus_bundles", "dvc", "dvc_yaml", "evaluation", "evaluation_harness",
    "evaluation_stage", "extending", "finetuning", "finetuning_training", "gguf", "initial_weights_guide", "kill",
    "large_vocabulary", "model", "model_families", "model_folders", "model_rotary", "pool", "serving", "signals",
    "stages", "tokens_encode_corpus", "tokens_executors", "tokens_loader", "tokens_units", "tracking",
    "tracking_failures", "tracking_replay", "training_checkpoints", "training_hellaswag", "training_initial_weights",
    "training_plan", "training_ranks", "training_resume", "training_schedule", "training_step", "vocabulary",
    "vocabulary_pipeline", "workspace_dvc", "workspace_provenance",
)  # fmt: skip
"""Files that `make test-fast` leaves out: they start processes, train, or try many inputs, and take 4 s and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
    if "PIPELIB_TEST_RUNS" not in os.environ:
        skip = pytest.mark.skip(reason="takes long; `make test-long` runs it")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
