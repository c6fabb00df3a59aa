"""Training goes on from weights that are there: which ones count, on every rank, and what is refused."""

import csv
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_corpus import make_texts, write_jsonl
from small_params import PARAMS, ROTARY, model_params, train_params, write_params
from small_project import Project
from small_run import export_random, random_model, train_small, write_tokens
from small_vocabulary import TOKENIZER

from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.errors import UserError
from pipelib.files import sha256_file, write_json
from pipelib.model.huggingface import WEIGHTS, export_model
from pipelib.model.params import family_params
from pipelib.model.shapes.gpt2 import GPT2Section
from pipelib.params import load_params
from pipelib.schema import ParamsError
from pipelib.training.initial_weights import initial_model
from pipelib.training.inputs import RANDOM_WEIGHTS, InitialWeights, find_initial_weights, require_weights


def section(init_from: str, **changes: int) -> GPT2Section:
    """Section `model` of the small model."""
    shape = model_params(**changes)
    return GPT2Section(shape.n_layer, shape.n_head, shape.n_embd, shape.context_length, init_from)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in ./mine and the same one as download's gpt2."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "data/models/gpt2"):
        export_random(tmp_path / name, model_params())
    digest = sha256_file(tmp_path / "data/models/gpt2" / WEIGHTS)
    write_json(tmp_path / "data/models/manifest.json", {"gpt2": {"sha256": digest}})
    return tmp_path


# ---- Which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_from", ["./mine", "gpt2"])
def test_the_model_starts_from_the_named_weights(here: Path, init_from: str) -> None:
    weights = find_initial_weights(section(init_from))
    assert weights.sha256 == sha256_file(here / "mine" / WEIGHTS)
    model = initial_model(section(init_from), TOKENIZER, 1, weights)
    assert torch.equal(model.h[1].mlp.c_fc.weight, random_model(model_params()).h[1].mlp.c_fc.weight)  # type: ignore[union-attr]


def test_from_scratch_nothing_has_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_initial_weights(section("scratch")).sha256 == ""


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "arcee"])
def test_with_zero_projections_no_block_changes_anything_yet(family: str) -> None:
    rotary = {key: value for key, value in ROTARY.items() if key != "init_from"}
    shape = model_params() if family == "gpt2" else family_params(family)(**rotary)  # the output layer is not tied
    weights = InitialWeights("", "", zero_projections=True)
    model = initial_model(shape, TOKENIZER, 7, weights)
    assert model.block_list is not None
    blocks = model.get_submodule(model.block_list[0])
    seen = []
    for block in blocks.children():
        block.register_forward_hook(lambda _, inputs, out: seen.append(torch.equal(inputs[0], out)))
    tokens = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = model.token_losses(tokens[:, :-1], tokens[:, 1:])
    assert seen == [True] * 2
    if family == "gpt2":
        assert losses.mean().item() == pytest.approx(math.log(TOKENIZER.size), abs=0.05)
    else:
        torch.testing.assert_close(losses, torch.full_like(losses, math.log(TOKENIZER.size)))
    other = initial_model(shape, TOKENIZER, 7, RANDOM_WEIGHTS)
    name = model.embedding_names[0]
    assert torch.equal(model.get_parameter(name), other.get_parameter(name)), "the rest is drawn as ever"


def test_a_checkpoint_wins_over_the_initial_weights(here: Path) -> None:
    write_tokens(here / "tokens")
    first = train_small(here, train_params(), shape=section("./mine"), initial=find_initial_weights(section("./mine")))
    export_random(here / "mine", model_params(), 2)
    again = train_small(here, train_params(), shape=section("./mine"), initial=find_initial_weights(section("./mine")))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


@pytest.mark.usefixtures("here")
def test_what_does_not_fit_is_refused_with_what_to_write() -> None:
    with pytest.raises(
        UserError, match=r"n_layer = 2, not 3, context_length = 16, not 32.*write model.n_layer: 2, model.c"
    ):
        require_weights(section("./mine", n_layer=3, context_length=32), TOKENIZER)
    with pytest.raises(UserError, match=r"model.init_from: nowhere is not a folder with a model.*name a folder"):
        find_initial_weights(section("./nowhere"))
    with pytest.raises(
        UserError, match=r"data/models/gpt2-xl is not a folder with a model.*dvc repro download fetches it"
    ):
        find_initial_weights(section("gpt2-xl"))


def test_published_weights_are_those_that_download_verified(here: Path) -> None:
    export_random(here / "data/models/gpt2", model_params(), 2)
    with pytest.raises(
        UserError, match=r"is not the file that data/models/manifest.json names.*verify data/models --repair"
    ):
        find_initial_weights(section("gpt2"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__init_from": "gpt2-medum"}, "'gpt2-medum' is none of scratch, zero_projections, gpt2, gpt2-medium"),
        ({"model__init_from": "gpt2-medum"}, "did you mean gpt2-medium?"),
        ({"model__init_from": "mine"}, "write ./mine if it is a folder"),
        ({"model__init_from": "gpt2"}, "download.models = [] does not name it; add it there"),
        (
            {"model__init_from": "gpt2"},
            "gpt2 has GPT-2's vocabulary, and vocabulary.source",
        ),
        (
            {"model__init_from": "gpt2", "download__models": ["gpt2"], "vocabulary__source": "gpt2"},
            "has n_layer = 12, not 2, n_head = 12, not 2, n_embd = 768, not 16, context_length = 1024, not 16, so its",
        ),
        ({"model__init_from": "./models"}, "./models is the output of train"),
    ],
)
def test_parameters_that_name_no_weights_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_params(tmp_path, **changes)
    with pytest.raises(ParamsError) as caught:
        load_params(tmp_path / "params.yaml")
    assert words in str(caught.value)


def test_parameters_that_name_published_weights_are_good(tmp_path: Path) -> None:
    for name, published in PUBLISHED_MODELS.items():
        model = {f"model__{key}": value for key, value in published.shape.items()}
        gpt2 = {"model__init_from": name, "download__models": [name], "vocabulary__source": "gpt2"}
        write_params(tmp_path, **model, **gpt2, evaluate__batch_tokens=1024)
        assert load_params(tmp_path / "params.yaml").model.init_from == name


# ---- The stage -------------------------------------------------------------------------------------------------------


def validation(project: Project) -> list[float]:
    with (project.root / "curves/validation.csv").open(newline="") as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file)]


@pytest.mark.long
def test_training_goes_on_from_a_model_on_the_users_own_text(tmp_path: Path) -> None:
    """The recipe of docs/how-it-works/training.md: source local, init_from a folder, a lower max_lr."""
    project = Project.make(tmp_path)
    write_jsonl(tmp_path / "texts/a.jsonl", make_texts(70))
    larger = {"train__global_batch_tokens": 256, "train__micro_batch_size": 16}
    write_params(tmp_path, train__max_lr=3e-2, train__max_tokens=12_288, train__max_epochs=100, **larger)
    for name in ("download", "vocabulary", "tokenize", "train"):
        project.runs(name, PIPELIB_THREADS="1")
    first = validation(project)
    assert first[-1] < first[0] - 1  # it starts near ln 50,257 = 10.82
    shutil.copytree(tmp_path / "models", tmp_path / "base")

    write_params(tmp_path, model__init_from="./base", train__max_lr=1e-3)
    project.runs("train", PIPELIB_THREADS="1")
    alone = validation(project)
    assert alone[0] == pytest.approx(first[-1], abs=1e-5)
    assert len(alone) == 5  # before the first of 40 steps, and after each 10
    assert alone[-1] < alone[0]
    readme = (tmp_path / "models/README.md").read_text(encoding="utf-8")
    assert f'| initial_weights_sha256 | "{sha256_file(tmp_path / "base" / WEIGHTS)}" |' in readme
    assert '| model.init_from | "./base" |' in readme

    shutil.rmtree(tmp_path / ".pipelib/train")
    project.runs("train", PIPELIB_NPROC="2", PIPELIB_THREADS="1")
    assert validation(project) == pytest.approx(alone, abs=1e-4)

    done = project.stage("train", PIPELIB_NPROC="2")
    assert "finished earlier" in done.stdout
    export_model(
        random_model(GPT2Section(**PARAMS["model"])), TOKENIZER, tmp_path / "base", ""
    )  # other weights under the same name
    project.runs("train", PIPELIB_THREADS="1")
    assert abs(validation(project)[0] - alone[0]) > 0.1
