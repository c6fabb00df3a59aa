"""The plan's numbers against published ones, and against what torch really saves."""

import ctypes
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_corpus import write_shards
from small_run import export_random

from pipelib.cli.main import main
from pipelib.files import read_json, write_json
from pipelib.inspection import speed
from pipelib.inspection.disk import disk_of
from pipelib.model.device import autocast
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.params import Params, load_params
from pipelib.progress import format_seconds
from pipelib.schema import read_yaml
from pipelib.tokens.shards import Manifest
from pipelib.training import memory
from pipelib.training.memory import Footprint
from pipelib.training.objectives import NextToken
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

PRESET = {
    "download.source": "hub", "download.repo": "HuggingFaceFW/fineweb-edu", "download.folder": "sample/10BT",
    "tokenize.shard_tokens": 100_000_000,
    "model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "model.context_length": 1024,
    "train.max_tokens": 9_800_000_000, "train.global_batch_tokens": 524_288, "train.sequence_length": 1024,
    "train.max_epochs": 1.0, "train.micro_batch_size": 64, "train.precision": "bf16", "evaluate.batch_tokens": 65_536,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def give_memory_back() -> Iterator[None]:
    """Several gigabytes of a large model's activations, which a training has the process keep."""
    yield
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


QUICK = Path(__file__).parents[1] / "presets/gpt2-quick.yaml"


def write_params(changes: dict[str, Any]) -> Path:
    """presets/gpt2-quick.yaml with some parameters changed, as params.yaml of the current folder."""
    params = read_yaml(QUICK)
    for key, value in changes.items():
        section, name = key.split(".")
        params[section][name] = value
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return Path("params.yaml")


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELIB_NPROC", "1")
    monkeypatch.delenv("PIPELIB_STATE_DIR", raising=False)
    (tmp_path / "conversations").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("text")
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_gpt2_124m_by_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    write_params(PRESET)
    said = plan(capsys, "--no-measure")
    for words in (
        "GPT-2, 124,439,808 parameters: 12 layers, 12 heads, 768 wide, context 1,024",
        "18,692 of 524,288 tokens = 9,799,991,296 tokens",
        "8 micro-steps a rank, of 64 rows of 1,024 tokens",
        "854.7 MFLOP a token, 8.376 EFLOP in total",
        "9,982,590,278 tokens (the hub's own count of tokens, and one for each of 9,672,101 documents)",
        "0.992 of the 9,882,590,278",
        "data/raw     28.5 GB",
        "data/tokens  20.0 GB",
        "models       497.8 MB",
    ):
        assert words in said
    assert "time" not in said
    assert {path.name for path in Path().iterdir()} == {"conversations", "corpus", "params.yaml"}  # it does nothing


def test_ranks_share_the_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a rank needs a GPU of its own")
    monkeypatch.setenv("PIPELIB_NPROC", "8")
    write_params(PRESET)
    said = plan(capsys, "--no-measure")
    assert "with 8 ranks" in said
    assert "1 micro-step a rank" in said


def test_what_the_train_stage_refuses_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({**PRESET, "train.max_epochs": 0.001})
    assert main(["plan"]) == 1
    said = capsys.readouterr()
    assert "have 9,882,590,278 tokens, so the training ends after 18 steps, which are too few (warmup_steps" in said.err
    assert "124,439,808 parameters" in said.out


def test_a_params_file_is_read_strictly(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({"train.max_step": 3}).rename("other.yaml")
    assert main(["plan", "--params", "other.yaml"]) == 1
    assert "train.max_step is not a parameter" in capsys.readouterr().err
    assert main(["plan", "--params", "nowhere.yaml"]) == 1
    assert "nowhere.yaml does not exist" in capsys.readouterr().err


def test_a_check_says_the_disk_that_is_needed_and_refuses_too_small_a_one(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(PRESET)
    free = 10**12
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    (line,) = plan(capsys, "--check").splitlines()
    assert line.startswith("params.yaml: the stages take at most 68.9 GB of disk; 0 B are in use by earlier runs")
    free = 10**10
    assert main(["plan", "--check"]) == 1
    assert "58.9 GB too little" in capsys.readouterr().err
    for name in ("data/raw/a.parquet", ".pipelib/download/x/final/data/raw/a.parquet"):
        (workspace / name).parent.mkdir(parents=True)
    with (workspace / "data/raw/a.parquet").open("wb") as file:
        file.truncate(60 * 10**9)  # a hole, which takes no space here
    (workspace / ".pipelib/download/x/final/data/raw/a.parquet").hardlink_to(workspace / "data/raw/a.parquet")
    assert "60.0 GB are in use by earlier runs" in plan(capsys, "--check"), "two names of one file are one file"


def test_a_check_finds_wrong_parameters_before_a_stage_does(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({"train.max_lr": -1})
    assert main(["plan", "--check"]) == 1
    assert "train.max_lr: -1 must be greater than 0" in capsys.readouterr().err


def make_model(folder: str, **changes: int) -> GPT2Params:
    """A small model in a Hugging Face folder, without its tokenizer."""
    shape = GPT2Params(**{"n_layer": 1, "n_head": 1, "n_embd": 4, "context_length": 128, **changes})
    export_random(Path(folder), shape, tokenizer=GPT2_TOKENIZER)
    (Path(folder) / "vocab.json").unlink()
    return shape


SMALL = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 4}
"""Section `model` that fits `make_model`."""


def test_a_check_of_models_that_are_there_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    make_model("mine")
    make_model("yours", n_layer=2, context_length=32)
    write_params({**SMALL, "model.init_from": "./mine", "evaluate.baselines": ["./yours", "./mine"]})
    assert len(plan(capsys, "--check").splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.init_from": "./nowhere"}, "model.init_from: nowhere is not a folder with a model"),
        ({"model.init_from": "openai-community/gpt2"}, "write gpt2 and add it to download.models"),
        ({"model.init_from": "me/mine"}, "run `hf download me/mine --local-dir ./mine`"),
        ({"model.init_from": "./mine"}, "./mine has n_layer = 1, not 2"),
        ({"model.init_from": "./broken"}, "model.init_from: broken/model.safetensors is missing"),
        ({"evaluate.baselines": ["./nowhere"]}, "evaluate.baselines: nowhere is not a folder with a model"),
        ({"evaluate.baselines": ["./mamba"]}, "mamba/config.json has model_type = 'mamba', and this code knows only arcee, gpt2"),
        ({"evaluate.baselines": ["gpt2"]}, "evaluate.baselines: gpt2 is not in download.models"),
        ({"evaluate.tasks": ["piqa"]}, "evaluate.tasks: piqa needs the data of the benchmark piqa"),
        ({"train.max_epochs": 1e-6}, "so the training ends after 0 steps, which are too few (max_tokens"),
        ({"train.max_tokens": 10**6, "train.global_batch_tokens": 10**6, "train.micro_batch_size": 3,
          "train.sequence_length": 125, "train.warmup_steps": 0}, "do not divide"),
    ],
)  # fmt: skip
def test_a_check_finds_what_a_later_stage_would_refuse(
    capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    make_model("mine")
    for name, kind in (("broken", "gpt2"), ("mamba", "mamba")):
        make_model(name)
        config = read_json(Path(name) / "config.json")
        write_json(Path(name) / "config.json", {**config, "model_type": kind})
    Path("broken/model.safetensors").unlink()
    write_params({"model.n_layer": 2, "model.n_head": 1, "model.n_embd": 4, **changes})
    assert main(["plan", "--check"]) == 1
    said = capsys.readouterr()
    assert words in said.err
    assert said.out == ""


def test_a_check_says_all_that_is_wrong_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a rank needs a GPU of its own")
    monkeypatch.setenv("PIPELIB_NPROC", "7")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    write_params({"model.init_from": "a/b", "evaluate.baselines": ["./c", "./d"], "train.max_epochs": 1e-6})
    assert main(["plan", "--check"]) == 1
    said = capsys.readouterr().err
    for words in (
        "model.init_from: a/b is not a folder",
        "evaluate.baselines: c is not a folder",
        "evaluate.baselines: d is not a folder",
        "7 ranks with train.micro_batch_size",
        "so the training ends after 0 steps",
        "too little, so a stage would stop half-way",
    ):
        assert words in said
    assert said.count("pipelib: ") == 1


def test_the_plan_refuses_what_the_check_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({"evaluate.baselines": ["./nowhere"]})
    assert main(["plan", "--no-measure"]) == 1
    said = capsys.readouterr()
    assert "evaluate.baselines: nowhere is not a folder with a model" in said.err
    assert "parameters: " in said.out


def test_an_estimate_refuses_nothing_that_could_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """The offline corpus varies with versions; what the hub counted does not."""
    for tokens, status in ((7_200_000, 0), (7_300_000, 1)):  # it has 7,144,214 besides the validation shard
        write_params({
            "train.global_batch_tokens": tokens // 32 * 32, "train.max_tokens": 8_000_000, "train.warmup_steps": 0,
            "train.sequence_length": 32, "train.micro_batch_size": 1,
        })  # fmt: skip
        assert main(["plan", "--check"]) == status
    assert "so no step can be trained" in capsys.readouterr().err


def test_a_plan_says_where_the_training_ends(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({**PRESET, "train.max_tokens": 99_000_000_000})
    said = plan(capsys, "--no-measure")
    passes = "train.max_epochs = 1, and the training shards have 9,882,590,278 tokens"
    assert f"train: {passes}, so the training ends after 9,882," in said
    assert "\nepochs      1 of the 9,882,590,278" in said


def test_text_that_may_have_grown_refuses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """With `source: local`, data/tokens may be of text that is no longer all there is."""
    changes = {"download.source": "local", "tokenize.shard_tokens": 100_000, "train.max_epochs": 1e-6}
    write_params(changes)
    Manifest(GPT2_TOKENIZER.encoding, {"kind": "local", "max_tokens": None}, tuple(
        write_shards(Path("data/tokens"), [np.zeros(500_000, np.uint16)], 100_000)
    )).write(Path("data/tokens"))  # fmt: skip
    assert len(plan(capsys, "--check").splitlines()) == 1
    assert main(["plan", "--no-measure"]) == 1
    assert "the training shards have 400,000 tokens, so the training ends after 0 steps" in capsys.readouterr().err
    write_params({**changes, "tokenize.dedup": "exact"})
    assert "unknown until tokenize has run" in plan(capsys, "--no-measure"), "duplicates may have been counted"


def test_data_that_is_there_counts(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({"download.source": "local", "tokenize.shard_tokens": 100_000})
    assert "unknown until tokenize has run" in plan(capsys, "--no-measure")
    tokens = np.zeros(500_000, np.uint16)
    folder = Path("data/tokens")
    for kind, known in (("local", True), ("docs", False)):
        Manifest(GPT2_TOKENIZER.encoding, {"kind": kind}, tuple(write_shards(folder, [tokens], 100_000))).write(folder)
        said = plan(capsys, "--no-measure")
        assert ("500,000 tokens (as data/tokens/manifest.json says)" in said) == known


def footprint(params: Params) -> Footprint:
    return Footprint(params.model, GPT2_TOKENIZER.size, params.train)


def saved_bytes(params: Params, rows: int, length: int) -> int:
    """What autograd keeps of one forward pass, the model's own parameters aside."""
    model = GPT2(params.model, GPT2_TOKENIZER.size)
    model.activation_checkpointing = params.train.activation_checkpointing
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    inputs = torch.zeros(rows, length, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(torch.device("cpu"), params.train.precision):
        NextToken(model)(inputs, inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_saves(precision: str) -> None:
    by_layers = []
    for layers in (2, 6):
        params = load_params(write_params({"train.precision": precision, "model.n_layer": layers}))
        by_layers.append((saved_bytes(params, 8, 128), footprint(params).memory(8, 128)))
    (few, few_memory), (many, many_memory) = by_layers
    expected = many_memory.activations - few_memory.activations + many_memory.copies - few_memory.copies
    assert many - few == pytest.approx(expected, rel=0.02)  # LayerNorms keep a little more


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_checkpointing_blocks_keep_their_inputs_alone(precision: str) -> None:
    saved, planned = [], []
    for layers in (2, 6):
        changes = {"train.precision": precision, "model.n_layer": layers, "train.activation_checkpointing": True}
        params = load_params(write_params(changes))
        saved.append(saved_bytes(params, 8, 128))
        planned.append(footprint(params).memory(8, 128).activations)
    width = 8 * 128 * params.model.n_embd
    assert saved[1] - saved[0] == planned[1] - planned[0] == 4 * 4 * width
    assert planned[0] == (2 * 4 + (36 if precision == "bf16" else 64)) * width


def test_parameters_disk_and_fixed_memory() -> None:
    params = load_params(write_params(PRESET))
    count = sum(
        parameter.numel() for parameter in GPT2(load_params(write_params({})).model, GPT2_TOKENIZER.size).parameters()
    )
    assert footprint(load_params(write_params({}))).parameters == count
    padded = 124_439_808 + 47 * 768
    need = footprint(params).memory(64, 1024)
    assert (need.weights, need.gradients, need.moments) == (4 * padded, 4 * padded, 8 * padded)
    assert need.logits == 64 * 1024 * 50304 * 12
    disk = disk_of(params, None)
    assert (disk.raw, disk.tokens, disk.checkpoints, disk.model) == (None, None, 4 * 12 * padded, 4 * 124_439_808)


def test_time_is_measured_on_the_model(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    write_params({"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16})
    said = plan(capsys)
    assert "of training and validation, at " in said
    assert "measured: real steps on " in said


def test_a_model_that_does_not_fit_is_guessed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "free_memory", lambda _: 1000)
    write_params({})
    assert "a guess: one short step would not fit in the memory that is free" in plan(capsys)
    monkeypatch.setattr(speed, "MICRO_STEP_SECONDS", 0.0)
    assert "a guess: one short step would take too long" in plan(capsys)


def test_an_automatic_micro_batch_and_the_copy_for_checkpoints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params({**PRESET, "train.micro_batch_size": "auto"})
    params = load_params(Path("params.yaml"))
    need = footprint(params).memory(4, 1024).total
    monkeypatch.setattr(memory, "free_memory", lambda _: int(need / 0.9) + 1 + footprint(params).checkpoint)
    said = plan(capsys, "--no-measure")
    assert "128 micro-steps a rank, of 4 rows of 1,024 tokens" in said
    assert "1.5 GB more main memory on the first rank, while a checkpoint is written" in said
    monkeypatch.setenv("PIPELIB_NNODES", "2")
    monkeypatch.setenv("PIPELIB_RDZV_ENDPOINT", "node01:29500")
    assert "with 2 ranks on 2 machines" in plan(capsys, "--no-measure")


def test_a_prefix_of_the_corpus_takes_whole_files_of_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({**PRESET, "download.max_tokens": 1_000_000_000, "train.max_tokens": 800_000_000})
    said = plan(capsys, "--no-measure")
    assert "1,000,000,000 tokens (about download.max_tokens, from the hub's own count" in said
    assert "data/raw     4.1 GB" in said  # 2 of 14 files


def test_what_dvc_cannot_track_is_refused_before_the_first_stage(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC hashes download.path whatever the source is, and a FIFO in it hangs it."""
    os.mkfifo(workspace / "corpus/fifo")
    (workspace / "corpus/linked").symlink_to(workspace)
    write_params({"download.source": "docs"})
    assert main(["plan", "--check"]) == 1
    said = capsys.readouterr().err
    assert "corpus/fifo is not a file" in said
    assert "linked" not in said
    write_params({"download.source": "local"})
    assert main(["plan", "--check"]) == 1
    assert "corpus/linked is a link to a folder" in capsys.readouterr().err


def test_time_and_price_on_other_machines(capsys: pytest.CaptureFixture[str]) -> None:
    """0.86 GFLOP a token at 124M, 10B tokens, 16 GPUs at 40 % of 989 TFLOP/s."""
    write_params(PRESET)
    text = plan(capsys, "--machines", "2x8xH100", "--price", "2.5")
    params = load_params(Path("params.yaml"))
    flops = params.model.flops_per_token(GPT2_TOKENIZER.size, 1024) * params.train.max_steps * 2**19
    hours = flops / (16 * 989e12 * 0.4) / 3600
    assert (
        f"there       {format_seconds(hours * 3600)} of training on 2 machines with 8 H100 each, if they reach 40%"
        in text
    )
    assert f"price       {hours * 16 * 2.5:,.2f}, at 2.5 for a GPU and hour" in text
    assert "16 ranks on 2 machines" in text
    assert "memory" not in text, "this machine's says nothing of theirs"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--machines", "8xH100"), "--machines 8xH100 is not MACHINESxGPUSxGPU"),
        (("--machines", "0x8xH100"), "is not MACHINESxGPUSxGPU"),
        (("--machines", "1x8xTPU"), "the peak of a GPU 'TPU' is not known here"),
        (("--price", "2"), "--price 2 needs --machines"),
        (("--machines", "1x8xH100", "--price", "-1"), "--price -1 needs --machines and a number of at least 0"),
        (("--machines", "1x8xH100", "--check"), "--machines is about other machines"),
    ],
)
def test_machines_that_are_none_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    write_params(PRESET)
    assert main(["plan", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_a_training_that_is_not_for_gpus_has_no_time_on_them(capsys: pytest.CaptureFixture[str]) -> None:
    write_params({**PRESET, "train.precision": "fp32"})
    assert main(["plan", "--machines", "1x8xH100"]) == 1
    assert "train.precision = fp32, and --machines knows the peaks of GPUs for bf16" in capsys.readouterr().err
