"""`pipelib evaluate` measures any GPT-2 in a folder, and says what is wrong with one before it writes anything."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_evaluation import completion_rows, write_lines
from small_params import model_params, write_params
from small_run import export_random, random_model, write_tokens

from pipelib.cli.main import main
from pipelib.evaluation.items import read_items_file
from pipelib.files import files_under, read_json, write_json
from pipelib.model.huggingface import export_model
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a benchmark and a model, without any stage's run."""
    folder = tmp_path_factory.mktemp("project")
    write_params(folder)
    write_tokens(folder / "data/tokens", 2048, tokenizer=GPT2_TOKENIZER)
    write_lines(folder / "data/benchmarks/completion.jsonl", completion_rows(6))
    export_model(
        random_model(model_params(context_length=24), tokenizer=GPT2_TOKENIZER), GPT2_TOKENIZER, folder / "mine", {}
    )
    export_random(folder / "yours", model_params(), 2, tokenizer=GPT2_TOKENIZER)
    return folder


@pytest.fixture(autouse=True)
def here(project: Path, tmp_path: Path, vocabulary_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(vocabulary_root))
    return tmp_path


def refuses(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must end with one message and write nothing."""
    before = files_under(Path())
    assert main(["evaluate", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.count("pipelib: ") == 1
    assert files_under(Path()) == before
    return message[message.index("pipelib: ") :]


def test_a_folder_is_measured_beside_another_and_the_report_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", "mine", "--baselines", "./yours", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    result = read_json(here / "out/evaluation.json")
    assert shown.startswith(f"validation loss, nats per token  this model  {result['val_loss']:.4f}")
    assert f"./yours     {result['baselines']['./yours']['val_loss']:.4f}" in shown
    assert {path.name for path in files_under(here / "out")} == {
        "evaluation.md", "evaluation.html", "evaluation.json", "items.npz",
    }  # fmt: skip
    assert read_items_file(here / "out/items.npz").keys() == {"validation", "completion"}
    assert "| model | `mine` |" in (here / "out/evaluation.md").read_text(encoding="utf-8")
    assert not (here / "metrics").exists()


def test_without_shards_the_benchmarks_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("data/tokens")
    assert main(["evaluate", "--model", "mine"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("completion.acc  ")
    assert "validation" not in shown
    shutil.rmtree("data/benchmarks")
    assert "nothing to measure; run dvc repro tokenize" in refuses(capsys, "--model", "mine").replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "helaswag"], "--tasks: 'helaswag' is not a task that runs offline, so it could not be scored; did"),
        (["--tasks", "piqa"], "data/benchmarks has no data for piqa"),
        (["--baselines", "gpt3"], "--baselines: 'gpt3' is neither a published model nor a folder (./gpt3); did you mean gpt2?"),
        (["--limit", "0"], "--limit 0 would score nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refuses(capsys, "--model", "mine", *arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 50258}, "config.json has vocab_size = 50258 where GPT-2 has 50257"),
        ({"n_positions": 48}, "does not fit its config.json (wpe.weight is (24, 16), not (48, 16))"),
        (
            {"model_type": "mamba"},
            "config.json has model_type = 'mamba', and this code knows only arcee, gpt2, llama, qwen3",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    config = json.loads(Path("mine/config.json").read_text(encoding="utf-8"))
    write_json(Path("mine/config.json"), {**config, **changes})
    assert words in refuses(capsys, "--model", "mine", "--out", "out")


def test_weights_that_are_lost_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    lost = random_model(model_params(context_length=24), tokenizer=GPT2_TOKENIZER)
    with torch.no_grad():
        lost.ln_f.bias.fill_(math.nan)
    export_model(lost, GPT2_TOKENIZER, Path("mine"), {})
    assert "ln_f.bias has 16 numbers of 16 that are infinite or not numbers" in refuses(
        capsys, "--model", "mine", "--out", "out"
    )


def test_a_folder_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere is not a folder with a model" in refuses(capsys, "--model", "nowhere")
