"""docs/extending.md, run as it is written. What runs again for others is in test_dvc.py."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from small_corpus import make_texts, write_jsonl
from small_params import write_params
from small_project import CHECKOUT, Project

from pipelib.files import read_json

PAGE = CHECKOUT / "docs/extending.md"


def page_file(name: str) -> str:
    """The file of that name on the page."""
    block = re.search(
        rf"\*\*`{re.escape(name)}`\*\*(?: gets)?\n\n```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert block, f"{PAGE} has no {name}"
    return block[1]


def add(root: Path, name: str) -> None:
    """Put a file of the page into a checkout; an entry of a list goes to its end."""
    path = root / name
    path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + page_file(name), encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project.make(tmp_path / "project")


def test_a_source(project: Project) -> None:
    add(project.root, "src/pipelib/corpus/sources/squares.py")
    write_params(project.root, download__source="squares")
    project.runs("download")
    assert read_json(project.root / "metrics/download.json")["documents"] == 10_000
    assert read_json(project.root / "data/raw/manifest.json")["source"] == {"kind": "squares", "count": 10_000}
    write_params(project.root, download__source="squars")
    project.refuses(
        "download", "download.source: 'squars' is not one of docs, hub, local, squares; did you mean squares?"
    )


RIDDLES = [{"question": "What is wet?", "answers": ["fire", "water"], "label": 1}] * 6


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    lines = "".join(json.dumps(riddle) + "\n" for riddle in RIDDLES).encode()
    revision = re.search(r"revision: (\w+)", page_file("src/pipelib/corpus/hub_benchmarks.yaml"))
    assert revision
    with FakeHub("someone/riddles", revision[1], {"data/validation.jsonl": lines}) as fake:
        yield fake


@pytest.mark.long
def test_a_benchmark(project: Project, hub: FakeHub, tmp_path: Path) -> None:
    add(project.root, "src/pipelib/corpus/hub_benchmarks.yaml")
    add(project.root, "src/pipelib/evaluation/tasks/riddles.yaml")
    write_jsonl(project.root / "texts/a.jsonl", make_texts(70))
    changes = {"download__benchmarks": ["completion", "riddles"], "evaluate__tasks": ["riddles"]}
    write_params(project.root, **changes)
    for stage in ("download", "vocabulary", "tokenize", "train", "evaluate"):
        project.runs(stage, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), PIPELIB_THREADS="1")
    assert read_json(project.root / "metrics/evaluate.json")["lm_eval"]["riddles"]["examples"] == len(RIDDLES)


def test_an_objective(project: Project) -> None:
    add(project.root, "src/pipelib/training/long_words.py")
    program = """
import sys; sys.path.insert(0, "src")
import torch
from pipelib.model.decoder import build
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.training.long_words import LongWords
model = build(GPT2Params(n_layer=1, n_head=1, n_embd=8, context_length=4), 50257)
model.initialise(1)
inputs, targets = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 20_000, 7, 30_000]])
objective = LongWords(model)
losses = model.token_losses(inputs, targets)
assert torch.allclose(objective(inputs, targets), losses[0, 1] + losses[0, 3])
assert objective.target_count(targets) == 2
"""
    done = project.python("-c", program)
    assert done.returncode == 0, done.stderr


def test_the_page_names_files_that_are_there() -> None:
    for name in re.findall(r"`((?:src|stages|tests)/[\w/.]+)`", PAGE.read_text(encoding="utf-8")):
        made = ("squares.py", "riddles.yaml", "long_words.py")
        assert "NAME" in name or name.endswith(made) or (CHECKOUT / name).exists(), name
