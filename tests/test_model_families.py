"""A family is two files: a toy of 71 lines goes through everything, and GPT-2's own words stand in its files alone."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_corpus import make_texts, write_jsonl
from small_evaluation import PARAMS as EVALUATE
from small_evaluation import completion_rows, plain_losses, write_lines
from small_params import PARAMS, train_params, write_params
from small_project import CHECKOUT, Project
from small_run import curve, train_small, write_tokens

from pipelib.errors import UserError
from pipelib.evaluation.benchmark_items import read_items
from pipelib.evaluation.harness import language_model
from pipelib.evaluation.hellaswag import score
from pipelib.files import read_json, write_json
from pipelib.model import families, shapes
from pipelib.model.decoder import Decoder, build
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.generate import GREEDY, generate, stream
from pipelib.model.huggingface import CONFIG, export_model, find_model, import_model
from pipelib.model.kv_cache import KVCache
from pipelib.model.params import InitialisedModelParams, ModelParams, family_params, known_families
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.schema import parse
from pipelib.training.memory import Footprint
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

TOY = Path(__file__).with_name("toy_family")
SIZE = GPT2_TOKENIZER.size
SHAPES = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_length": 24},
    "toy": {"width": 16, "context_length": 24},
    **{
        family: {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "context_length": 24, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, **({"rope_scaling": None} if family == "llama" else {}),
        }
        for family in ("llama", "qwen3", "arcee")
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's two files beside GPT-2's."""
    for package, folder in ((families, "families"), (shapes, "shapes")):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(TOY / folder)])


def params_of(family: str) -> ModelParams:
    return family_params(family)(**SHAPES[family])


def model_of(family: str, seed: int = 3) -> Decoder:
    """A model with weights that are larger than initial ones, so that its tokens differ."""
    model = build(params_of(family), SIZE)
    model.initialise(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10.0)
    return model.eval()


FAMILIES = pytest.mark.parametrize("family", SHAPES)


@FAMILIES
def test_a_family_counts_what_is_there_and_starts_from_a_uniform_guess(family: str) -> None:
    params = params_of(family)
    footprint = Footprint(params, SIZE, train_params())
    model = build(params, SIZE)
    model.initialise(1)
    assert sum(parameter.numel() for parameter in model.parameters()) == footprint.parameters
    assert all(model.get_parameter(name)[SIZE:].eq(0).all() for name in model.embedding_names)
    tokens = torch.randint(0, SIZE, (2, 25), generator=torch.Generator().manual_seed(1))
    assert model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean().item() == pytest.approx(np.log(SIZE), abs=0.1)
    assert footprint.memory(2, 16).total > 16 * footprint.parameters
    section = parse(
        InitialisedModelParams, {"architecture": family, **SHAPES[family], "init_from": "scratch"}, "model", []
    )
    assert isinstance(section, family_params(family))
    assert "architecture" not in params_of("gpt2").decides()
    assert params_of("toy").decides()["architecture"] == "toy"


PROMPTS = [[5, 9, 300], [7], [11, 12, 13, 14, 15, 16, 17], [300, 5]]


@FAMILIES
def test_the_cache_writes_what_the_whole_text_gives(family: str) -> None:
    model = model_of(family)
    texts = [list(prompt) for prompt in PROMPTS]
    for text in texts:
        for _ in range(12):
            with torch.no_grad():
                text.append(int(model.logits(model.hidden(torch.tensor([text]))[0, -1]).argmax()))
    written = generate(model, PROMPTS, 12, GREEDY)
    assert written == [text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)]


@FAMILIES
def test_a_text_that_joins_later_has_the_logits_that_it_has_alone(family: str) -> None:
    """Texts come and go: a long one among short ones, a short one among long ones, and all but three leave."""
    model = model_of(family)
    joins = {0: 0, 1: 0, 2: 3, 3: 6, 4: 9}
    leaves = {0: 8, 2: 11}
    prompts = {0: [5, 9, 300], 1: [7], 2: list(range(20, 29)), 3: [8, 8], 4: [1, 2, 3]}
    cache, rows, texts = KVCache(model, 5, 4), list[int](), dict[int, list[int]]()  # fewer columns than are needed
    for step in range(14):
        for name in [name for name, left in leaves.items() if left == step]:
            row = rows.index(name)
            cache.remove(row)
            rows[row] = rows[-1]
            rows.pop()
        logits = [cache.step([texts[name][-1] for name in rows])] if rows else []
        if new := [name for name in joins if joins[name] == step]:
            logits.append(cache.add([prompts[name] for name in new]))
            rows += new
            texts |= {name: list(prompts[name]) for name in new}
        found = torch.cat(logits)[:, : model.vocab_size]
        with torch.no_grad():
            alone = torch.cat([model.logits(model.hidden(torch.tensor([texts[name]]))[:, -1]) for name in rows])
        assert (found - alone[:, : model.vocab_size]).abs().max() < 1e-4 * found.abs().max(), step
        for name, row_of in zip(rows, found, strict=True):
            texts[name].append(int(row_of.argmax()))
    assert set(rows) == {1, 3, 4}
    for name in rows:
        start = len(prompts[name])
        assert texts[name][start:] == generate(model, [prompts[name]], len(texts[name]) - start, GREEDY)[0], name


@FAMILIES
def test_a_stream_is_the_text_token_by_token(family: str) -> None:
    model = model_of(family)
    texts: list[list[int]] = [[] for _ in PROMPTS]
    order = []
    for row, token in stream(model, PROMPTS, 6, seed=2):
        texts[row].append(token)
        order.append(row)
    assert texts == generate(model, PROMPTS, 6, seed=2)
    assert order == list(range(len(PROMPTS))) * 6
    with pytest.raises(UserError, match="the prompt is empty"):
        stream(model, [[]], 1)  # at once, not with the first token


@FAMILIES
def test_benchmarks_are_scored_as_one_ending_at_a_time(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    items = read_items(write_lines(tmp_path / "items.jsonl", completion_rows(12)), GPT2_TOKENIZER)
    scores = score(model, items, 128, "fp32")
    for item, sums in zip(items, scores.sums, strict=True):
        assert sums.tolist() == pytest.approx(plain_losses(model, item)[0], rel=1e-4)


@FAMILIES
def test_a_model_comes_back_from_its_folder(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    export_model(model, GPT2_TOKENIZER, tmp_path, {})
    assert read_json(tmp_path / CONFIG)["model_type"] == family
    back = import_model(tmp_path, GPT2_TOKENIZER)
    assert (type(back), back.params) == (type(model), model.params)
    assert all(map(torch.equal, back.state_dict().values(), model.state_dict().values()))
    context_length = {"gpt2": "n_positions", "toy": "context_length"}.get(family, "max_position_embeddings")
    write_json(tmp_path / CONFIG, {**read_json(tmp_path / CONFIG), context_length: -1})
    with pytest.raises(UserError, match=f"does not describe a {model.params.title}: {context_length}: -1 "):
        find_model(tmp_path, GPT2_TOKENIZER)


def test_weights_of_another_family_do_not_fit(tmp_path: Path) -> None:
    section: Any = parse(
        InitialisedModelParams, {"architecture": "toy", **SHAPES["toy"], "init_from": "./mine"}, "model", []
    )
    assert section.difference(params_of("toy")) == ""
    said = section.difference(params_of("gpt2"))
    assert said.startswith("architecture = gpt2, not toy, n_layer = 2, not None")
    export_model(model_of("toy"), GPT2_TOKENIZER, tmp_path, {})
    (tmp_path / CONFIG).write_text(json.dumps({**read_json(tmp_path / CONFIG), "model_type": "gpt2"}))
    with pytest.raises(UserError, match="does not describe a GPT-2"):
        import_model(tmp_path, GPT2_TOKENIZER)


@FAMILIES
def test_a_training_that_resumes_ends_with_the_same_weights(family: str, tmp_path: Path) -> None:
    params = train_params(max_tokens=1280)
    runs = []
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        write_tokens(tmp_path / name / "tokens")
        runs.append(train_small(tmp_path / name, params, shape=params_of(family), checkpoint_every=7))
    folder = tmp_path / "resumed" / "work" / "checkpoints"
    last = max(path for path in folder.iterdir() if path.is_dir())
    shutil.rmtree(last)
    again = train_small(tmp_path / "resumed", params, shape=params_of(family), checkpoint_every=7)
    for one, two, three in zip(*(model.state_dict().values() for model in (*runs, again)), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    losses = [row["loss"] for row in curve(tmp_path / "resumed")]
    assert losses[-1] < losses[0]


def test_the_harness_takes_a_toy() -> None:
    model = language_model(model_of("toy"), GPT2_TOKENIZER, EVALUATE, lambda: open("/dev/null"))  # noqa: SIM115, PTH123
    assert model._loglikelihood_tokens([(("a", "b"), [1, 2], [3])])[0][0] < 0


# ---- The pipeline ----------------------------------------------------------------------------------------------------

TOY_MODEL = {"architecture": "toy", "width": 16, "context_length": 32, "init_from": "scratch"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(tmp_path_factory.mktemp("toy"))
    for folder in ("families", "shapes"):
        shutil.copy(TOY / folder / "toy.py", project.root / "src/pipelib/model" / folder)
    write_jsonl(project.root / "texts/a.jsonl", make_texts(70))
    write_params(project.root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARAMS, "model", TOY_MODEL)
        patch.setitem(PARAMS["evaluate"], "tasks", ["heldout"])
        patch.setitem(PARAMS["evaluate"], "task_limit", 4)
        write_params(project.root)
    return project


@pytest.mark.long
def test_a_toy_goes_through_the_pipeline(project: Project) -> None:
    for stage in ("download", "vocabulary", "tokenize", "train", "evaluate"):
        project.runs(stage, PIPELIB_THREADS="1")
    metrics = read_json(project.root / "metrics/train.json")
    assert metrics["parameters"] == SIZE * 16 + 16**2
    readme = (project.root / "models/README.md").read_text(encoding="utf-8")
    assert "# Toy, 804,368 parameters" in readme
    assert '| model.architecture | "toy" |' in readme
    report = (project.root / "reports/evaluation.md").read_text(encoding="utf-8")
    assert "Toy: 16 wide, context 32" in report
    for command, words in (
        (["plan", "--no-measure"], "Toy, 804,368 parameters: 16 wide, context 32"),
        (["sample", "--prompt", "The", "--tokens", "5"], "The"),
    ):
        done = project.python(
            "-c", f"import sys; sys.path.insert(0, 'src'); from pipelib.cli.main import main; main({command})"
        )
        assert words in done.stdout, done.stdout + done.stderr


# ---- Words -----------------------------------------------------------------------------------------------------------

OWN = ("model/families/gpt2.py", "model/shapes/gpt2.py", "corpus/baselines.py", "inspection/gguf_file.py")
"""GPT-2's files, the config that download wants of OpenAI's models, and what GGUF calls the shape of each family."""


def test_gpt2s_names_stand_in_its_own_files_alone() -> None:
    source = CHECKOUT / "src/pipelib"
    for path in source.rglob("*.py"):
        if (name := path.relative_to(source).as_posix()) not in OWN:
            text = path.read_text(encoding="utf-8")
            for word in (
                r"\bwte\b",
                r"\bwpe\b",
                r"\.h\b(?!\")",
                "n_embd",
                r"\bn_layer\b",
                "c_proj",
                r"import GPT2\b",
                "GPT2Params",
            ):
                found = re.search(rf"^.*{word}.*$", re.sub(r"malloc\.h|prctl\.h|Python\.h", "", text), re.MULTILINE)
                assert not found, f"{name}: {found and found[0]}"


def test_families_are_known_by_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"gpt2", "toy"} <= set(known_families())
    for package in (families, shapes):
        monkeypatch.setattr(package, "__path__", package.__path__[:1])
    assert "toy" not in known_families()
    names = sorted(path.stem for path in (CHECKOUT / "src/pipelib/model/families").glob("[a-z]*.py"))
    assert names == known_families(), "each family has two files"
    assert GPT2Params.title == "GPT-2"
    assert GPT2.architecture == "gpt2"
