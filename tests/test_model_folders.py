"""The folders that people have: read as transformers reads them, or refused with what lies there and what to do."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_run import random_model
from torch import Tensor
from transformers import GPT2Config

from pipelib.errors import UserError
from pipelib.files import files_under, read_json, write_json
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model, find_model, import_model
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.model.weights import CONFIG, INDEX, WEIGHTS, weights_sha256
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SHAPE = GPT2Params(n_layer=2, n_head=2, n_embd=4, context_length=8)
HEAD, EMBEDDING, NORM = "lm_head.weight", "transformer.wte.weight", "transformer.ln_f.bias"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> GPT2:
    return random_model(SHAPE, tokenizer=GPT2_TOKENIZER)


@pytest.fixture(scope="module")
def exported(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without its tokenizer's files, which take longest to read."""
    folder = tmp_path_factory.mktemp("model")
    export_model(model, GPT2_TOKENIZER, folder, {})
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported, tmp_path / "mine"))


def change_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Write other weights; `change` works on the mapping, or returns another one."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / WEIGHTS, metadata={"format": "pt"})


def add(**tensors: Tensor) -> Callable[[Tensors], None]:
    """Tensors by their names, with `__` for the dot."""
    return lambda found: found.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def change_config(folder: Path, **changes: Any) -> None:
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **changes})


def refused(folder: Path, *words: str) -> str:
    """The message about a folder, which must have these words in it."""
    with pytest.raises(UserError) as caught:
        import_model(folder, GPT2_TOKENIZER)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def same(one: GPT2, other: GPT2) -> bool:
    """Whether two models have the same weights, the vocabulary's padding aside."""
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return all(
        torch.equal(*(t[: GPT2_TOKENIZER.size] if name == "wte.weight" else t for t in (a, b)))
        for (name, a), b in pairs
    )


# ---- What follows from other tensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False, None])
def test_a_head_is_compared_with_the_embedding(folder: Path, model: GPT2, tied: bool | None) -> None:
    change_config(folder, tie_word_embeddings=tied)
    if tied is None:
        write_json(folder / CONFIG, {k: v for k, v in read_json(folder / CONFIG).items() if k != "tie_word_embeddings"})
    change_tensors(folder, lambda found: {**found, HEAD: found[EMBEDDING].clone()})
    assert same(import_model(folder, GPT2_TOKENIZER), model)

    def differ_in_one_number(found: Tensors) -> None:
        found[HEAD][GPT2_TOKENIZER.size - 1, 3] += 1

    change_tensors(folder, differ_in_one_number)
    refused(folder, "lm_head.weight is not the token embedding", "a separate head", "whose head is tied")


def test_what_is_untied_and_has_no_head_is_refused(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    refused(folder, "lm_head.weight is missing, and tie_word_embeddings is False")


def test_a_head_of_another_shape_is_refused(folder: Path) -> None:
    change_tensors(folder, add(lm_head__weight=torch.zeros(7, 4)))
    refused(folder, "lm_head.weight is not the token embedding")


CAUSAL = torch.ones(8, 8).tril()


@pytest.mark.parametrize(
    "mask", [CAUSAL.view(1, 1, 8, 8), CAUSAL, CAUSAL.bool(), CAUSAL.to(torch.uint8).view(1, 1, 8, 8)]
)
def test_a_causal_mask_is_what_our_model_does(folder: Path, model: GPT2, mask: Tensor) -> None:
    added = {"transformer__h__0__attn__bias": mask, "transformer__h__1__attn__masked_bias": torch.tensor(-1e4)}
    change_tensors(folder, add(**added))
    assert same(import_model(folder, GPT2_TOKENIZER), model)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("bias", torch.ones(1, 1, 8, 8)),
        ("bias", CAUSAL.T.contiguous()),
        ("bias", CAUSAL * 2),
        ("bias", CAUSAL - torch.ones(8, 8).tril(-3)),  # a window of three
        ("bias", torch.ones(64)),
        ("bias", torch.zeros(0, 0)),
        ("bias", torch.tensor(1.0)),
        ("masked_bias", torch.tensor(0.0)),
        ("masked_bias", torch.tensor(math.nan)),
        ("masked_bias", torch.full((8,), -1e4)),
    ],
)  # fmt: skip
def test_another_mask_is_refused(folder: Path, name: str, tensor: Tensor) -> None:
    change_tensors(folder, add(**{f"transformer__h__1__attn__{name}": tensor}))
    refused(folder, f"transformer.h.1.attn.{name} is not the causal mask of GPT-2")


# ---- Names and types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "_orig_mod.module." + name,
        lambda name: name.removeprefix("transformer."),
        lambda name: name.replace("transformer.h.0.", "transformer.h.0._orig_mod."),
    ],
)
def test_what_compile_and_ddp_put_before_a_name_is_dropped(
    folder: Path, model: GPT2, rename: Callable[[str], str]
) -> None:
    change_tensors(folder, lambda found: {rename(name): tensor for name, tensor in found.items()})
    assert same(import_model(folder, GPT2_TOKENIZER), model)


def test_a_name_that_comes_twice_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda found: {**found, "_orig_mod." + NORM: found[NORM] + 1})
    refused(folder, "has transformer.ln_f.bias and _orig_mod.transformer.ln_f.bias", "unclear which of the two to use")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_become_fp32(folder: Path, model: GPT2, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda found: {name: tensor.to(dtype) for name, tensor in found.items()})
    state = import_model(folder, GPT2_TOKENIZER).state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == torch.float32
        assert torch.equal(state[name][: GPT2_TOKENIZER.size], tensor.to(dtype).float()[: GPT2_TOKENIZER.size])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_numbers_that_are_quantised_are_refused(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda found: found.update({NORM: found[NORM].to(dtype)}))
    refused(folder, "transformer.ln_f.bias is of type", "quantised or damaged")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EMBEDDING, NORM, "transformer.h.1.mlp.c_fc.weight"])
def test_numbers_that_are_not_finite_are_refused_with_file_and_tensor(folder: Path, name: str, value: float) -> None:
    change_tensors(folder, lambda found: found[name].view(-1)[2:4].fill_(value))
    refused(folder, f"{folder / WEIGHTS}: {name} has 2 numbers of ", "infinite or not numbers", "an earlier checkpoint")


def test_doubles_that_fp32_cannot_hold_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda found: found.update({NORM: torch.full((4,), 1e300, dtype=torch.float64)}))
    refused(folder, "ln_f.bias has 4 numbers of 4 that are infinite")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (add(score__weight=torch.ones(1, 4)), "score.weight is not a tensor of GPT-2"),
        (add(h__0__attn__c_attn__weight__absmax=torch.ones(4)), "h.0.attn.c_attn.weight.absmax is not a tensor of GPT-2"),
        (lambda found: found.pop(NORM), "ln_f.bias is missing"),
        (lambda found: found.pop(EMBEDDING), "wte.weight is missing"),
        (lambda found: found.clear(), "it has 0 blocks"),
        (
            lambda found: {
                name: tensor.T.contiguous() if tensor.dim() == 2 and ".h." in name else tensor
                for name, tensor in found.items()
            },
            "have nanoGPT's layout: convert the checkpoint itself, see docs/how-to/initial-weights.md",
        ),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(folder: Path, change: Callable[[Tensors], Any], words: str) -> None:
    change_tensors(folder, change)
    refused(folder, "does not fit its config.json", words)


@pytest.mark.parametrize(
    "changes", [{"n_layer": 10**9}, {"n_embd": 10**12, "n_head": 1}, {"n_positions": 10**15}, {"n_layer": 10**300}]
)
def test_an_absurd_size_makes_no_model(folder: Path, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(*_: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(GPT2, "__init__", no_model)
    change_config(folder, **changes)
    refused(folder, "config.json")


# ---- The vocabulary --------------------------------------------------------------------------------------------------


def pad(rows: int) -> Callable[[Tensors], None]:
    """More rows of the embedding, which are not zero."""
    return lambda found: found.update(
        {EMBEDDING: torch.cat([found[EMBEDDING], torch.ones(rows - GPT2_TOKENIZER.size, 4)])}
    )


@pytest.mark.parametrize(("rows", "vocab_size"), [(50304, 50304), (50304, 50257), (50264, 50264), (51200, 51200)])
def test_padding_of_the_vocabulary_is_left_out_and_said(
    folder: Path, model: GPT2, rows: int, vocab_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensors(folder, pad(rows))
    change_tensors(folder, lambda found: {**found, HEAD: found[EMBEDDING].clone()})
    change_config(folder, vocab_size=vocab_size)
    imported = import_model(folder, GPT2_TOKENIZER)
    assert same(imported, model)
    assert imported.wte.weight[GPT2_TOKENIZER.size :].eq(0).all()
    assert f"the {rows - GPT2_TOKENIZER.size} rows of its embedding beyond GPT-2's 50,257 tokens are padding" in (
        capsys.readouterr().err
    )
    import_model(folder, GPT2_TOKENIZER, quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("rows", "vocab_size", "words"),
    [
        (50258, 50258, "vocab_size = 50258 where GPT-2 has 50257"),
        (50258, 50257, "wte.weight is (50258, 4), not (50257, 4)"),
        (50304, 50264, "wte.weight is (50304, 4), not (50264, 4)"),
        (50257, 50304, "wte.weight is (50257, 4), not (50304, 4)"),
        (50257, 65, "vocab_size = 65 where GPT-2 has 50257"),
    ],
)
def test_other_numbers_of_tokens_are_refused(folder: Path, rows: int, vocab_size: int, words: str) -> None:
    if rows > GPT2_TOKENIZER.size:
        change_tensors(folder, pad(rows))
    change_config(folder, vocab_size=vocab_size)
    refused(folder, words)


def write_tokenizer(folder: Path, name: str, more: dict[str, int]) -> None:
    """GPT-2's vocabulary in one of two forms, with changes."""
    vocabulary = read_json(folder / "vocab.json") | more
    (folder / "vocab.json").unlink()
    whole = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [{"id": 50256, "content": "<|endoftext|>"}]}
    write_json(folder / name, vocabulary if name == "vocab.json" else whole)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_another_tokenizer_is_refused_though_it_has_as_many_tokens(model: GPT2, tmp_path: Path, name: str) -> None:
    export_model(model, GPT2_TOKENIZER, tmp_path / "good", {})
    write_tokenizer(tmp_path / "good", name, {})
    assert same(import_model(tmp_path / "good", GPT2_TOKENIZER), model)
    export_model(model, GPT2_TOKENIZER, tmp_path / "other", {})
    write_tokenizer(tmp_path / "other", name, {"Ġthe": 11, ",": 262})
    refused(tmp_path / "other", f"{name} is not GPT-2's vocabulary (2 of 50,257 tokens differ, for example ',')")


@pytest.mark.parametrize("where", ["vocab.json", "added_tokens.json", "tokenizer.json"])
def test_tokens_that_were_added_are_named(folder: Path, model: GPT2, where: str) -> None:
    change_tensors(folder, pad(50304))
    change_config(folder, vocab_size=50304)
    if where == "added_tokens.json":
        write_json(folder / where, {"<|im_start|>": 50257, "[PAD]": 50258})
    else:
        export_model(model, GPT2_TOKENIZER, folder.parent / "whole", {})
        shutil.copy(folder.parent / "whole/vocab.json", folder)
        write_tokenizer(folder, where, {"<|im_start|>": 50257, "[PAD]": 50258})
    refused(
        folder, "2 tokens that GPT-2 does not have (<|im_start|> = 50257, [PAD] = 50258)", "resize_token_embeddings"
    )


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model": 3}', '{"model": {"vocab": []}}'])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    refused(folder, name)


# ---- Several files ---------------------------------------------------------------------------------------------------


def split(folder: Path) -> dict[str, str]:
    """Write the weights as two files and their index, as transformers does; the file of each tensor."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (number > 9)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file, {"format": "pt"})
    write_json(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": where})
    return where


def test_weights_in_several_files_are_read(folder: Path, model: GPT2) -> None:
    single = weights_sha256(folder)
    split(folder)
    assert same(import_model(folder, GPT2_TOKENIZER), model)
    sharded = weights_sha256(folder)
    assert sharded != single
    with (folder / "model-00002-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert weights_sha256(folder) not in (single, sharded)


def test_a_single_file_wins_over_an_index(folder: Path, model: GPT2) -> None:
    write_json(folder / INDEX, {"weight_map": {"a": "b.safetensors"}})
    assert same(import_model(folder, GPT2_TOKENIZER), model)


@pytest.mark.parametrize(
    "file", ["../mine.safetensors", "/etc/a.safetensors", "deep/a.safetensors", "a.bin", "", "..", 5, None, ["a"]]
)
def test_an_index_that_points_elsewhere_is_refused(folder: Path, file: object) -> None:
    where: dict[str, Any] = {**split(folder), NORM: file}
    write_json(folder / INDEX, {"weight_map": where})
    refused(folder, f"names {file!r}, which is not a .safetensors file beside it, so it was not read")


def test_an_index_and_files_that_do_not_agree_are_refused(folder: Path) -> None:
    where = split(folder)
    last = "model-00002-of-00002.safetensors"
    write_json(folder / INDEX, {"weight_map": {**where, "more": last}})
    refused(folder, f"lists more in {last}, but that file does not contain it (1 such tensors)")
    write_json(folder / INDEX, {"weight_map": {name: file for name, file in where.items() if name != NORM}})
    refused(folder, "does not list it there")
    write_json(folder / INDEX, {"weight_map": where})
    (folder / last).unlink()
    refused(
        folder,
        f"names 2 files of weights, and 1 of them are missing (the first is {last})",
        "copy or download it again",
    )


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 10**5, "9" * 5000]
)
def test_an_index_that_says_nothing_is_refused(folder: Path, content: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(content)
    refused(folder, INDEX)


# ---- What lies there instead -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "a LoRA adapter: merge it into its base model"),
        (["pytorch_model.bin", "config.json"], "from_pretrained(folder).save_pretrained(folder) for folder in"),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], "makes them from pytorch_model-*.bin"),
        (
            ["ckpt.pt"],
            "`python docs/how-to/nanogpt_checkpoint.py there/ckpt.pt there-converted` converts it to a folder",
        ),
        (["model-00001-of-00002.safetensors"], "their index is missing: get model.safetensors.index.json"),
        (["model.fp16.safetensors"], "rename model.fp16.safetensors to model.safetensors"),
        (["consolidated.00.pth"], "consolidated.00.pth was written by torch.save"),
        (["training_args.bin"], "training_args.bin is not a file that transformers writes"),
        (["gpt2.Q4_K_M.gguf"], "gpt2.Q4_K_M.gguf is llama.cpp's format"),
        (["flax_model.msgpack"], "Flax's format: get the model's PyTorch weights"),
        (["tf_model.h5"], "TensorFlow's format"),
        (["model.ckpt.index", "model.ckpt.data-00000-of-00001"], "model.ckpt.index is TensorFlow's format"),
        (["model.onnx"], "ONNX's format"),
        (["checkpoint-500/model.safetensors"], "name the folder there/checkpoint-500"),
        (["snapshots/607a30d/model.safetensors"], "name the folder there/snapshots/607a30d"),
        (["notes.txt"], "give a Hugging Face folder with safetensors"),
        ([], "give a Hugging Face folder with safetensors"),
    ],
)
def test_another_format_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    for name in names:
        path = "there" / Path(name)
        path.parent.mkdir(exist_ok=True, parents=True)
        content: dict[str, object] = {"model_type": "gpt2", "vocab_size": GPT2_TOKENIZER.size}
        write_json(path, {**content, "n_layer": 2, "n_head": 2, "n_embd": 4, "n_positions": 8})
    refused(Path("there"), "there/model.safetensors is missing", words)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 548105171\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder"),
        (b"", "is empty, so there is nothing to read"),
        (b"PK\x03\x04rest of a zip", "was written by torch.save, not by safetensors"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(90), "is a TensorFlow file, not a safetensors file"),
        (b"<!DOCTYPE html><html>", "is a web page, not the file itself; download the file again"),
        (b"\xff" * 100, "is damaged (Error while deserializing header"),
        (b"\x08" + bytes(7) + b"{}      ", "it has 0 blocks"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_bytes_that_are_not_safetensors_are_named(folder: Path, content: bytes, words: str, sharded: bool) -> None:
    path = folder / (WEIGHTS if not sharded else split(folder)[NORM])
    path.write_bytes(content)
    message = refused(folder, words if not (sharded and words.startswith("it has")) else "does not contain it")
    assert "verify" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "config.json is a git-lfs pointer"),
        (b"<html>", "config.json is a web page"),
        (b"", "config.json is empty"),
        (b"[]", "config.json holds '[]' and not a JSON object with keys"),
        (b'"gpt2"', "and not a JSON object with keys"),
        (b"null", "holds 'None' and not a JSON object"),
        (b"{", "config.json is not JSON"),
        (b"\xff\xfe{\x00", "config.json is not JSON"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"n_layer": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
    ],
)
def test_a_config_that_is_not_an_object_is_refused(folder: Path, content: bytes, words: str) -> None:
    (folder / CONFIG).write_bytes(content)
    assert "verify" not in refused(folder, words)


def test_remedies_are_those_of_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / WEIGHTS).write_bytes(b"\xff" * 99)
    for name, remedy in (
        ("mine", "copy or download it again"),
        ("models", "run `pipelib verify models --repair`, then dvc repro"),
        ("data/models/gpt2", "run `pipelib verify data/models --repair`, then dvc repro"),
    ):
        if name != "mine":
            shutil.copytree(folder, name)
        refused(Path(name), "is damaged", remedy)


def test_a_name_that_is_not_a_folder_says_what_may_have_been_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "/srv")
    Path("model.safetensors").write_bytes(b"")
    for name, words in {
        "nowhere": "name a folder with a model, for example ./gpt2",
        "openai-community/gpt2": "write gpt2 and add it to download.models, or run `hf download openai-community/gpt2",
        "me/my.gpt-2": "run `hf download me/my.gpt-2 --local-dir ./my.gpt-2` and name ./my.gpt-2",
        "~/gpt2": "~ and $NAME are not expanded here: write /home/me/gpt2",
        "$WHERE/gpt2": "write /srv/gpt2",
        "./model.safetensors": "it is a file: name its folder, ./",
        "data/models/gpt2": "dvc repro download fetches it where download.models names it: [gpt2]",
        "models": "run dvc repro, which makes it",
        "./" + "a" * 5000: "name a folder",
        "./a\0b": "name a folder",
    }.items():
        refused(Path(name), "is not a folder with a model", words)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_folder_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name} does not exist" if name == CONFIG else f"{name} is missing")


# ---- Any byte, any value ---------------------------------------------------------------------------------------------

KEYS = (
    "model_type", "vocab_size", "n_layer", "n_head", "n_embd", "n_positions", "n_inner", "activation_function",
    "layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention",
    "tie_word_embeddings", "quantization_config",
)  # fmt: skip
ODD = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1.0, 2**63, 2**64, 10**300, 10**400, 1e300, "", [], {}, [1], {"a": None}]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def import_or_refuse(folder: Path) -> GPT2 | None:
    """The model, or None where a message refuses it; anything else that is raised fails the test."""
    try:
        return import_model(folder, GPT2_TOKENIZER, quiet=True)
    except UserError:
        return None


@QUICK
@example(key="scale_attn_weights", value=True)
@example(key="n_inner", value=4 * SHAPE.n_embd)
@example(key="n_inner", value=None)
@given(key=st.sampled_from(KEYS), value=ODD)
def test_any_value_in_a_config_gives_the_model_or_a_message(
    folder: Path, exported: Path, model: GPT2, key: str, value: object
) -> None:
    config = read_json(exported / CONFIG)
    (folder / CONFIG).write_text(json.dumps({**config, key: value}))
    found = import_or_refuse(folder)
    if found is not None and key == "n_head":
        assert value in (1, 2, 4)  # what divides n_embd; nothing else in the folder tells
    elif found is not None:
        assert same(found, model)
        unsaid = GPT2Config().to_dict().get(key)
        same_words = (config.get(key, unsaid), unsaid, *([4 * SHAPE.n_embd] if key == "n_inner" else []))
        assert value in same_words, f"{key} = {value!r} is another architecture"


@QUICK
@given(data=st.data(), name=st.sampled_from([CONFIG, WEIGHTS, INDEX, "model-00001-of-00002.safetensors"]))
def test_a_flipped_byte_gives_a_model_or_a_message(
    folder: Path, exported: Path, data: st.DataObject, name: str
) -> None:
    shutil.rmtree(folder)
    shutil.copytree(exported, folder)
    if name not in (CONFIG, WEIGHTS):
        split(folder)
    content = bytearray((folder / name).read_bytes())
    end = data.draw(st.sampled_from([4000, len(content)]), label="end")  # headers are 2,000 bytes long
    place = data.draw(st.integers(0, min(len(content), end) - 1), label="place")
    content[place] ^= data.draw(st.integers(1, 255), label="flip")
    (folder / name).write_bytes(content)
    import_or_refuse(folder)


def test_looking_at_a_folder_reads_no_numbers(folder: Path) -> None:
    change_tensors(folder, lambda found: found[NORM].fill_(math.nan))
    assert find_model(folder, GPT2_TOKENIZER).model.params == SHAPE
    assert sorted(path.name for path in files_under(folder)) == [
        "README.md", CONFIG, "generation_config.json", WEIGHTS, "recipe.json",
    ]  # fmt: skip


def test_a_model_that_is_read_leaves_torchs_random_stream_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    import_model(folder, GPT2_TOKENIZER)
    assert torch.equal(torch.get_rng_state(), before)
