"""params.yaml and every preset are read whole; what is wrong in one is said in one message, before any work."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc_data.hashfile.meta import Meta
from small_project import CHECKOUT

from pipelib.params import Params, load_params
from pipelib.schema import ParamsError
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
QUICK = ROOT / "presets/gpt2-quick.yaml"
SIZES = {"124m": 124_439_808, "350m": 354_823_168, "774m": 774_030_080, "1558m": 1_557_611_200}
"""Parameters of OpenAI's four models (https://huggingface.co/openai-community/gpt2, and -medium, -large, -xl)."""


def load_changed(tmp_path: Path, *changes: tuple[str, object], source: Path = QUICK) -> Params:
    """presets/gpt2-quick.yaml with some keys set, as `load_params` reads it."""
    values: dict[str, Any] = copy.deepcopy(yaml.safe_load(source.read_text(encoding="utf-8")))
    for key, value in changes:
        section, name = key.split(".")
        values[section][name] = value
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_params(path)


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *PRESETS], ids=lambda path: path.name)
def test_every_parameter_file_is_good(path: Path) -> None:
    params = load_params(path)
    assert params.train.max_steps > params.train.warmup_steps
    if params.train.micro_batch_size != "auto":
        assert params.train.gradient_accumulation_steps(1) >= 1


def test_every_key_of_params_yaml_has_a_comment() -> None:
    for line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("  ") and not line.lstrip().startswith("-"):
            assert "#" in line, line


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_have_the_keys_of_params_yaml_in_its_order_and_say_where_these_are_explained(path: Path) -> None:
    """A family has keys of its own in section `model`: those of GPT-2 stand in gpt2-quick.yaml, those of Qwen3 in params.yaml."""
    text = path.read_text(encoding="utf-8")
    is_gpt2 = yaml.safe_load(text)["model"]["architecture"] == "gpt2"
    keys, explained_keys = (
        [(section, key) for section, values in yaml.safe_load(source).items() for key in values]
        for source in (text, (QUICK if is_gpt2 else ROOT / "params.yaml").read_text(encoding="utf-8"))
    )
    assert keys == explained_keys
    assert path == QUICK or "# Keys      explained in docs/reference.md#parameters" in text


@pytest.mark.parametrize("size", SIZES)
def test_presets_are_the_published_models(size: str) -> None:
    params = load_params(ROOT / "presets" / f"gpt2-{size}.yaml")
    assert params.model.parameters(GPT2_TOKENIZER.size) == SIZES[size]
    assert params.model.context_length == 1024
    assert params.train.global_batch_tokens == 524_288
    assert params.tokenize.shard_tokens == 100_000_000
    assert params.download.source == "hub"
    for ranks in (1, 8):
        assert params.train.rows_per_step % (params.train.micro_batch_size * ranks) == 0


def test_there_is_a_preset_of_every_size() -> None:
    others = {"gpt3-125m", "gpt2-quick", "modern-124m", "modern-350m", "modern-24gb"}
    assert {path.stem for path in PRESETS} == {*others, *(f"gpt2-{size}" for size in SIZES)}


@pytest.mark.parametrize(("name", "size"), [("124m", 162_151_680), ("24gb", 162_151_680), ("350m", 411_264_000)])
def test_modern_presets_are_what_their_headers_say(name: str, size: int) -> None:
    path = ROOT / f"presets/modern-{name}.yaml"
    params, text = load_params(path), path.read_text(encoding="utf-8")
    assert params.model.parameters(GPT2_TOKENIZER.size) == size
    assert f"# Size      {size:,} parameters" in text
    flops = params.model.flops_per_token(GPT2_TOKENIZER.size, 1024)
    found = re.search(r"# Compute +([\d.]+) GFLOP per token, ([\d.]+) EFLOP in ([\d,]+) steps", text)
    assert found
    assert float(found[1]) == pytest.approx(flops / 1e9, rel=0.01)
    assert float(found[2]) == pytest.approx(flops * params.train.max_tokens / 1e18, rel=0.02)
    assert found[3] == f"{params.train.max_steps:,}"


def test_gpt3s_preset_is_the_published_shape_and_recipe() -> None:
    """Brown et al. 2020, tables 2.1 and B: 0.5M tokens a step, 6.0e-4, warmup over 375M tokens, down to a tenth."""
    params = load_params(ROOT / "presets/gpt3-125m.yaml")
    model, train = params.model, params.train
    assert (model.n_layer, model.n_head, model.n_embd, model.context_length) == (12, 12, 768, 2048)
    assert model.parameters(GPT2_TOKENIZER.size) == SIZES["124m"] + 1024 * 768 == 125_226_240
    assert (train.sequence_length, train.global_batch_tokens, train.max_lr, train.min_lr) == (2048, 2**19, 6e-4, 6e-5)
    assert train.warmup_steps * train.global_batch_tokens == pytest.approx(375e6, rel=1e-3)
    assert (train.beta1, train.beta2, train.eps, train.weight_decay, train.grad_clip_norm) == (
        0.9,
        0.95,
        1e-8,
        0.1,
        1.0,
    )
    for ranks in (1, 8):
        assert train.rows_per_step % (train.micro_batch_size * ranks) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("train.sequence_length", 512), ("train.micro_batch_size", 2)],
         ["train.sequence_length: 512 is longer than model.context_length = 128"]),
        ([("train.micro_batch_size", 3)],
         ["train.micro_batch_size: 3 rows of 128 tokens do not divide", "(global_batch_tokens: "]),
        ([("train.min_lr", 1.0)], ["train.min_lr: 1 is greater than max_lr = 0.003"]),
        ([("train.max_tokens", 100)], ["train.max_tokens: 100 is less than one step"]),
        ([("train.warmup_steps", 5000)], ["train.warmup_steps: warmup takes 5000 of ", "max_lr would never be reached"]),
        ([("model.n_head", 3)], ["model.n_embd: 64 is not a multiple of n_head = 3", "nearest that fits is 63"]),
        ([("tokenize.shard_tokens", 10)], ["tokenize.shard_tokens: 10 must be at least 1024"]),
        ([("download.benchmarks", []), ("download.benchmark_documents", 0)],
         ["evaluate.tasks: completion needs the data", "evaluate.tasks: heldout needs the data"]),
        ([("download.benchmarks", ["completion"] * 2)], ["lists a name twice"]),
        ([("train.hellaswag_every", 10)], ["train.hellaswag_every: 10 needs the ", "['completion'] does not name hellaswag"]),
        ([("download.models", ["gpt2"] * 2)], ["download.models: ['gpt2', 'gpt2'] lists a name twice"]),
        ([("download.models", ["gpt2-medum"])], ["did you mean gpt2-medium?"]),
        ([("download.max_tokens", 0)], ["download.max_tokens: 0 must be greater than 0"]),
        ([("download.benchmark_documents", 3)], ["3 documents cannot give an item and three wrong endings"]),
        ([("download.source", "hub"), ("download.revision", "main")], ["download.revision: 'main' is not a commit"]),
        ([("download.source", "hub"), ("download.repo", "x")], ["download.repo: 'x' is not OWNER/NAME"]),
        ([("evaluate.tasks", ["completions"])], ["'completions' is not a task", "did you mean completion?"]),
        ([("evaluate.batch_tokens", 64)], ["evaluate.batch_tokens: 64 is less than one context of 128"]),
        ([("train.seed", 2**64)], ["train.seed: 18446744073709551616 must be at most 9223372036854775807"]),
        ([("model.n_layer", 10**400), ("train.max_tokens", 10**400)], ["model.n_layer: ", "train.max_tokens: "]),
        ([("evaluate.baselines", ["./models"])], ["evaluate.baselines: ./models is the output of train"]),
        ([("train.beta2", 1.0)], ["train.beta2: 1.0 must be at most"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, changes: list[tuple[str, object]], words: list[str]
) -> None:
    with pytest.raises(ParamsError) as caught:
        load_changed(tmp_path, *changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_all_problems_of_all_sections_come_in_one_message(tmp_path: Path) -> None:
    changes = [("train.max_step", 5), ("model.n_layer", 0), ("logging.mlflow", "on"), ("evaluate.precision", "fp8")]
    with pytest.raises(ParamsError) as caught:
        load_changed(tmp_path, *changes)
    message = str(caught.value)
    assert "params.yaml has 4 problems; nothing was run." in message
    assert (
        "train.max_step is not a parameter, so its value would be ignored; did you mean train.max_steps?" not in message
    )
    for words in (
        "train.max_step is not a parameter",
        "model.n_layer: 0",
        "logging.mlflow: 'on'",
        "evaluate.precision",
    ):
        assert f"\n  - {words}" in message


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("download: {}\n", encoding="utf-8")
    with pytest.raises(ParamsError, match=r"train is missing, and no parameter has a default in code"):
        load_params(path)


@pytest.mark.parametrize(
    ("typed", "read", "value"),
    [
        ("train.max_lr=6e-5", lambda params: params.train.max_lr, 6e-5),
        ("train.min_lr=1e-9", lambda params: params.train.min_lr, 1e-9),
        ("train.max_tokens=1e5", lambda params: params.train.max_tokens, 100_000),
        ("evaluate.task_limit=null", lambda params: params.evaluate.task_limit, None),
    ],
)
def test_what_dvc_writes_is_read_as_what_was_typed(
    tmp_path: Path, typed: str, read: Callable[[Params], object], value: object
) -> None:
    """`dvc exp run -S` writes YAML 1.2: 6e-05 without a point, which PyYAML alone reads as text."""
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(path, [typed, "train.warmup_steps=2", *(["train.min_lr=0"] if "max_lr" in typed else [])])
    found = read(load_params(path))
    assert found == value
    assert type(found) is type(value)


def test_the_same_bytes_as_dvc_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    apply_overrides(path, ["train.max_lr=6e-5"])
    assert "max_lr: 6e-05" in path.read_text(encoding="utf-8")
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["max_lr"] == "6e-05"  # why we read YAML 1.2


def test_a_tenth_of_the_usual_learning_rate_goes_with_the_default_parameters(tmp_path: Path) -> None:
    load_changed(tmp_path, ("train.max_lr", 6e-5))


def test_dvcs_run_cache_compares_every_parameter() -> None:
    """It leaves keys of these names out wherever they are, and would take the outs of other values for those of this one."""

    def names(values: object) -> set[str]:
        if not isinstance(values, dict):
            return set()
        return values.keys() | {name for value in values.values() for name in names(value)}

    for path in (CHECKOUT / "params.yaml", *(CHECKOUT / "presets").glob("*.yaml")):
        assert not names(yaml.safe_load(path.read_text(encoding="utf-8"))) & {Meta.PARAM_SIZE, Meta.PARAM_NFILES}
