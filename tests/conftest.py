"""What all tests share: an environment that nobody set up, and folders to work in."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ("small_tracking",)


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """No variable of this shell that changes what the pipeline does, except what sets the size and the data of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("PIPELIB_", "DVC_", "MLFLOW_")) and not name.startswith("PIPELIB_TEST_"):
                patch.delenv(name)
        yield


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory, where the state goes too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def vocabulary_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder for tests that tokenize, so that the vocabulary is laid out once."""
    return tmp_path_factory.mktemp("state")


LONGEST = ("test_training.py", "test_kill.py", "test_dvc.py", "test_tokens_encode_corpus.py", "test_tokens_units.py")
"""A file stays on one worker, so the longest ones start first: else the last one would keep one core waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
