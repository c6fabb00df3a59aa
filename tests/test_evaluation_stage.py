"""The evaluate stage: its report, the baselines beside the model, and nothing written where something is wrong."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_evaluation import (
    PARAMS,
    completion_rows,
    state,  # noqa: F401 (a fixture)
    write_lines,
)
from small_params import model_params, train_params
from small_run import export_random, train_small, write_tokens
from small_vocabulary import TOKENIZER
from warm_pool import fork_workers

from pipelib.corpus.published_models import folder_name
from pipelib.errors import UserError
from pipelib.evaluation import baselines, measure
from pipelib.evaluation.evaluate import evaluate
from pipelib.evaluation.inputs import evaluation_inputs, require_data
from pipelib.evaluation.items import Measured, read_items_file
from pipelib.evaluation.params import EvaluateParams
from pipelib.evaluation.published import FIGURES, model_sizes, published_beside
from pipelib.evaluation.report import Subject, write_report
from pipelib.files import files_under, read_json, sha256_file, write_json
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model
from pipelib.stage import Build
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the stage reads, after a short training."""
    folder = tmp_path_factory.mktemp("trained")
    write_tokens(folder / "tokens", 2048)
    model = train_small(folder, train_params(max_tokens=640))
    export_model(model, TOKENIZER, folder / "models", {})
    (folder / "curves").mkdir()
    for name in ("train.csv", "validation.csv", "samples.csv"):
        shutil.copy(folder / "work" / name, folder / "curves")
    write_lines(folder / "benchmarks/completion.jsonl", completion_rows(9))
    return folder


@pytest.fixture(autouse=True)
def short_samples(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are short, nothing that was measured is found, and workers are forks of a process with torch imported."""
    request.getfixturevalue("state")  # which sets the variable too
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("pipelib.evaluation.samples.SAMPLE_TOKENS", 8)
    fork_workers(monkeypatch, "torch", "pipelib.evaluation.measure")


def folders(root: Path) -> tuple[Path, ...]:
    return tuple(root / name for name in ("models", "tokens", "benchmarks", "curves", "chat"))


def run_evaluation(folder: Path, outs: Path, params: EvaluateParams = PARAMS) -> tuple[Any, Any]:
    """Build `outs/reports`."""
    outs.mkdir()
    code = {"package torch": "2", "src/pipelib/evaluation/endings.py": "a", "src/pipelib/evaluation/report.py": "b"}
    build = Build(outs, outs.parent / "scratch", NullRun(), code, resumed_with_other_code=False)
    return evaluate(build, params, *folders(folder))


# ---- The report ------------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_measured_and_is_the_same_each_time(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, speed = run_evaluation(trained, tmp_path / "first")
    shown = capsys.readouterr().err
    assert re.search(r"models: validation loss: [\d.]+ on 511 tokens, .* in ", shown)
    assert "models: completion: acc " in shown
    again, _ = run_evaluation(trained, tmp_path / "second")
    assert result == again
    reports = [
        {path.name: path.read_bytes() for path in files_under(tmp_path / name / "reports")}
        for name in ("first", "second")
    ]
    assert reports[0] == reports[1]
    assert reports[0].keys() == {
        "evaluation.md", "evaluation.html", "loss.png", "learning_rate.png", "grad_norm.png", "items.npz", "model_card.md"
    }  # fmt: skip
    text = reports[0]["evaluation.md"].decode()
    row = "| validation loss, nats per token | **this model** |"
    assert f"{row} {result['val_loss']:.4f} | 511 tokens | measured here |" in text
    acc_norm = result["completion"]["acc_norm"]
    assert f"| completion.acc_norm | **this model** | {acc_norm['value']:.4f} ({acc_norm['low']:.4f} to" in text
    assert "| completion.acc_norm | unigram model |" in text
    assert "| tokens trained on | 640 of 1,536 in the data |" in text
    assert f"| weights | SHA-256 `{sha256_file(trained / 'models/model.safetensors')}` |" in text
    assert "torch 2" in text
    assert "````text\nThe" in text
    with Image.open(tmp_path / "first/reports/loss.png") as picture:
        picture.load()
        assert picture.size == (960, 540)
    assert result["val_tokens"] == 511
    assert acc_norm["items"] == 9
    assert result["completion"]["contexts_cut"] > 0
    assert "baselines" not in result
    assert speed["loss_seconds"] >= 0


@pytest.mark.usefixtures("one_thread")
def test_several_gpus_measure_the_same(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes stand for two GPUs; each has half of the cores, as a rank has."""
    alone, _ = run_evaluation(trained, tmp_path / "alone")
    shutil.rmtree(tmp_path / "state")  # else what was measured would be found there
    monkeypatch.setattr("pipelib.evaluation.measure.gpu_count", lambda: 2)
    monkeypatch.setenv("PIPELIB_THREADS", "1")
    monkeypatch.setattr(measure, "measure_part", None)  # nothing is measured in this process
    together, speed = run_evaluation(trained, tmp_path / "together")
    assert together == alone
    assert speed["loss_seconds"] > 0
    items = [(tmp_path / name / "reports/items.npz").read_bytes() for name in ("alone", "together")]
    assert items[0] == items[1]


def test_the_web_page_needs_no_network(trained: Path, tmp_path: Path) -> None:
    result, _ = run_evaluation(trained, tmp_path / "outs")
    page = (tmp_path / "outs/reports/evaluation.html").read_text(encoding="utf-8")
    assert f"<td>{result['val_loss']:.4f}</td>" in page
    assert "<strong>this model</strong>" in page
    loads = re.findall(r'(?:src|href)="([^"]{0,22})', page) + re.findall(r"url\(|@import|<script|<link", page)
    assert loads == ["data:image/png;base64,"] * 3


def test_every_item_is_kept(trained: Path, tmp_path: Path) -> None:
    result, _ = run_evaluation(trained, tmp_path / "outs")
    items = read_items_file(tmp_path / "outs/reports/items.npz")
    assert items.keys() == {"validation", "completion"}
    losses, tokens = items["validation"].values["loss"], items["validation"].weights["loss"]
    assert tokens.sum() == 511
    assert np.average(losses, weights=tokens) == pytest.approx(result["val_loss"], abs=1e-6)
    for metric in ("acc", "acc_norm"):
        assert items["completion"].values[metric].mean() == pytest.approx(
            result["completion"][metric]["value"], abs=1e-4
        )
    assert items["completion"].documents.tolist() == [number // 3 for number in range(9)]


def test_a_curve_of_hellaswag_is_drawn(trained: Path, tmp_path: Path) -> None:
    curves = tmp_path / "curves"
    shutil.copytree(trained / "curves", curves)
    (curves / "hellaswag.csv").write_text(
        "step,tokens,acc,acc_norm,low,high\n5,320,0.25,0.26,0.2,0.3\n10,640,0.26,0.28,0.22,0.32\n"
    )
    accuracy = {"value": 0.28, "low": 0.2, "high": 0.3, "items": 10}
    result = {"hellaswag": {"acc": accuracy, "acc_norm": accuracy, "contexts_cut": 0}}
    write_report(tmp_path / "reports", Subject(result, {}, 124_000_000, 50257, {}, {}, [], curves))
    text = (tmp_path / "reports/evaluation.md").read_text(encoding="utf-8")
    assert "![HellaSwag during training](hellaswag.png)" in text
    assert "| hellaswag.acc_norm | GPT-2 124M | 0.2955 |  | published: llm.c" in text
    assert "| hellaswag.acc_norm | GPT-3 125M | 0.3370 |  | published: Brown et al." in text
    with Image.open(tmp_path / "reports/hellaswag.png") as picture:
        assert picture.size == (960, 540)


def test_published_figures_stand_beside_models_of_their_size_and_text() -> None:
    edu = {"kind": "hub", "repo": "HuggingFaceFW/fineweb-edu"}
    assert all(figure.source and figure.model in model_sizes() for figure in FIGURES)
    assert [figure.value for figure in published_beside("val_loss", 124_000_000, edu)] == [3.2924]
    assert published_beside("val_loss", 124_000_000, {"kind": "docs"}) == []
    assert published_beside("completion.acc_norm", 124_000_000, edu) == []
    assert {figure.model for figure in published_beside("hellaswag.acc_norm", 1_500_000_000, edu)} == {
        "GPT-2 774M", "GPT-2 1558M", "GPT-3 1.3B", "GPT-3 760M",
    }  # fmt: skip
    assert {figure.model for figure in published_beside("hellaswag.acc_norm", 7_000_000, edu)} == {"GPT-2 124M"}


# ---- Baselines -------------------------------------------------------------------------------------------------------

BASELINE = f"Someone/Tiny@{'c' * 40}"
DOWNLOADED = Path("data/models") / folder_name(BASELINE)
"""A model of the hub, in the small vocabulary; a downloaded GPT-2 would have its own, in which everything takes longer."""


@pytest.fixture
def with_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateParams:
    """A published model as download leaves it, and a folder of the user's; the state is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    export_random(DOWNLOADED, model_params(), 2)
    export_random(Path("other"), model_params(n_embd=32, context_length=24), 3)
    write_json(Path("data/models/manifest.json"), {BASELINE: {"sha256": sha256_file(DOWNLOADED / "model.safetensors")}})
    return replace(PARAMS, baselines=(BASELINE, "./other"))


def write_chat(folder: Path, seed: int) -> None:
    """What finetune leaves."""
    export_random(folder / "model", model_params(), seed, recipe={"finetune": {"max_lr": 0.1}})
    base = {"init_from": "models", "weights_sha256": "b" * 64}
    lineage = {"source": "local", "base": base, "conversations": {"sha256": "c" * 64, "tokens_sha256": "d" * 64}}
    write_json(folder / "manifest.json", lineage)
    write_json(
        folder / "answers.json",
        {"questions": [{"question": "Why | so?", "answer": "Because."}], "measured": {"val_loss": 1.5}},
    )


def test_a_chat_model_is_measured_beside_its_base_which_is_not_measured_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data of this test"
    shutil.copytree(trained, folder)
    plain, _ = run_evaluation(folder, tmp_path / "plain")
    assert "chat" not in plain
    monkeypatch.setattr("pipelib.evaluation.measure.import_model", only_once("model"))
    write_chat(folder / "chat", 5)
    result, _ = run_evaluation(folder, tmp_path / "first")
    assert {name: value for name, value in result.items() if name != "chat"} == plain
    assert result["chat"]["val_loss"] != result["val_loss"]
    text = (tmp_path / "first/reports/evaluation.md").read_text(encoding="utf-8")
    assert f"| validation loss, nats per token | {folder / 'chat/model'} | {result['chat']['val_loss']:.4f} |" in text
    card = (tmp_path / "first/reports/chat_card.md").read_text(encoding="utf-8")
    assert "**Why | so?**\n\n````text\nBecause.\n````" in card
    assert "| val_loss | 1.5000 |  |" in card
    assert 'from_pretrained("chat/model")' in card
    assert "| base | `models`, weights SHA-256 `bbbb" in card
    assert "| finetune.max_lr | 0.1 |" in card
    assert "chat" not in (tmp_path / "first/reports/model_card.md").read_text(encoding="utf-8")


def test_baselines_are_measured_once_and_stand_beside_the_model(
    trained: Path, tmp_path: Path, with_baselines: EvaluateParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_random(Path("data/models/gpt2"), model_params(), 4, tokenizer=GPT2_TOKENIZER)
    manifest = read_json(Path("data/models/manifest.json"))
    sha256 = sha256_file(Path("data/models/gpt2/model.safetensors"))
    write_json(Path("data/models/manifest.json"), {**manifest, "gpt2": {"sha256": sha256}})
    with_baselines = replace(with_baselines, baselines=("gpt2", *with_baselines.baselines))
    result, speed = run_evaluation(trained, tmp_path / "first", with_baselines)
    assert result["baselines"].keys() == {"gpt2", BASELINE, "./other"}
    assert result["baselines"][BASELINE]["val_tokens"] == 511
    assert result["baselines"][BASELINE]["val_loss"] != result["val_loss"]
    assert speed["gpt2_seconds"] > 0
    assert speed[f"{BASELINE}_seconds"] > 0
    text = (tmp_path / "first/reports/evaluation.md").read_text(encoding="utf-8")
    for name in (BASELINE, "./other"):
        value = result["baselines"][name]["val_loss"]
        assert f"| validation loss, nats per token | {name} | {value:.4f} | 511 tokens | measured here |" in text
        assert f"| completion.acc | {name} |" in text

    shutil.rmtree("data/models/gpt2")  # the result is kept by its hash, so the weights are needed no more
    monkeypatch.setattr("pipelib.evaluation.measure.import_model", only_once())
    again, speed = run_evaluation(trained, tmp_path / "second", with_baselines)
    assert again == result
    assert speed["gpt2_seconds"] == speed[f"{BASELINE}_seconds"] == 0
    assert (tmp_path / "first/reports/evaluation.md").read_text(encoding="utf-8") == text

    kept = sorted((tmp_path / "state/baselines").glob("*/items.npz"))
    assert len(kept) == 4
    for path in kept:
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"gpt2: .* is missing, so it cannot be measured; run `dvc pull data/models`"):
        run_evaluation(trained, tmp_path / "third", with_baselines)
    assert files_under(tmp_path / "third") == []


def test_a_kept_result_that_cannot_be_read_asks_for_no_action(
    tmp_path: Path, with_baselines: EvaluateParams, capsys: pytest.CaptureFixture[str]
) -> None:
    (baseline,) = baselines.find_baselines(with_baselines.baselines[:1], TOKENIZER)
    measured = Measured({"val_loss": 1.0}, {}, {})
    for text in (None, "{", "[1]"):
        for path in (tmp_path / "state/baselines").glob("*/result.json"):
            path.write_text(text or "")
        assert baselines.measure_once(baseline, {}, lambda: measured) == measured
        said = capsys.readouterr().out
        assert said.endswith("; no action is needed: the baseline is measured again\n") == (text is not None)
        assert "verify" not in said


def only_once(name: str = "models") -> Any:
    """`import_model` of the model in a folder of this name, and of no other."""
    from pipelib.model.huggingface import import_model

    def load(folder: Path, _: object) -> GPT2:
        assert folder.name == name, f"{folder} was loaded again"
        return import_model(folder, TOKENIZER)

    return load


def test_a_baseline_is_measured_again_when_anything_that_decides_it_changes(
    trained: Path, tmp_path: Path, with_baselines: EvaluateParams
) -> None:
    params = replace(with_baselines, baselines=(BASELINE,))
    folder = tmp_path / "data of this test"
    shutil.copytree(trained, folder)
    run_evaluation(folder, tmp_path / "first", params)
    run_evaluation(folder, tmp_path / "samples", replace(params, sample_prompts=("Other",)))
    assert len(list((tmp_path / "state/baselines").iterdir())) == 2, "our model and one other"
    write_lines(folder / "benchmarks/completion.jsonl", completion_rows(6))
    run_evaluation(folder, tmp_path / "items", params)
    run_evaluation(folder, tmp_path / "batch", replace(params, batch_tokens=64))
    export_random(DOWNLOADED, model_params(), 5)
    write_json(Path("data/models/manifest.json"), {BASELINE: {"sha256": sha256_file(DOWNLOADED / "model.safetensors")}})
    run_evaluation(folder, tmp_path / "weights", params)
    assert len(list((tmp_path / "state/baselines").iterdir())) == 2 * 3 + 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "gpt2-xl",
            "gpt2-xl is not in data/models/manifest.json, so its weights are missing; name it in download.models",
        ),
        ("./nowhere", "evaluate.baselines: nowhere is not a folder with a model, so there are no weights to read"),
    ],
)
@pytest.mark.usefixtures("with_baselines")
def test_a_baseline_that_is_not_there_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        baselines.find_baselines([name], TOKENIZER)


def test_weights_that_are_not_those_of_the_manifest_are_refused(
    trained: Path, tmp_path: Path, with_baselines: EvaluateParams
) -> None:
    export_random(DOWNLOADED, model_params(), 9)
    with pytest.raises(UserError, match="cannot be trusted"):
        run_evaluation(trained, tmp_path / "outs", with_baselines)
    assert files_under(tmp_path / "outs") == []


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("benchmarks", "gpus"), [(True, 1), (False, 1), (True, 2)])
def test_weights_that_are_lost_are_an_error_and_no_score(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, benchmarks: bool, gpus: int
) -> None:
    monkeypatch.setattr("pipelib.evaluation.measure.gpu_count", lambda: gpus)
    folder = tmp_path / "lost"
    shutil.copytree(trained, folder, ignore=None if benchmarks else shutil.ignore_patterns("completion.jsonl"))
    model = GPT2(model_params(), TOKENIZER.size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)  # finite, so that it can be loaded; its logits are not
    export_model(model, TOKENIZER, folder / "models", {})
    with pytest.raises(UserError, match="its weights are unusable"):
        run_evaluation(folder, tmp_path / "outs")
    assert files_under(tmp_path / "outs") == []


def test_missing_data_of_a_task_is_said_before_anything_is_computed(trained: Path) -> None:
    params = replace(PARAMS, tasks=("completion", "heldout", "piqa"))
    with pytest.raises(UserError, match=r"no data for heldout, piqa, .*name completion, piqa in download.benchmarks"):
        evaluation_inputs(params, *folders(trained))
    require_data(replace(PARAMS, tasks=("completion",)), trained / "benchmarks")


def test_every_file_that_is_read_decides_the_evaluation(trained: Path, with_baselines: EvaluateParams) -> None:
    before = evaluation_inputs(PARAMS, *folders(trained))
    assert evaluation_inputs(replace(PARAMS, batch_tokens=64), *folders(trained)) != before
    for name in ("models/README.md", "benchmarks/completion.jsonl", "curves/train.csv", "tokens/unigram_counts.npy"):
        kept = (trained / name).read_bytes()
        (trained / name).write_bytes(kept + b"\n")
        assert evaluation_inputs(PARAMS, *folders(trained)) != before, name
        (trained / name).write_bytes(kept)
    assert evaluation_inputs(PARAMS, *folders(trained)) == before
    of_baselines = evaluation_inputs(with_baselines, *folders(trained))
    export_random(Path("other"), model_params(), 7)
    assert evaluation_inputs(with_baselines, *folders(trained)) != of_baselines
