"""docs/how-to/initial-weights.md: what people have becomes a folder that starts a training, by the commands it names."""

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_project import CHECKOUT
from small_run import random_model
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model, import_model
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.model.tokenizer import resize_command
from pipelib.model.weights import CONVERT, GUIDE, NANOGPT, WEIGHTS
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SHAPE = GPT2Params(n_layer=2, n_head=2, n_embd=8, context_length=16)
SCRIPT = CHECKOUT / NANOGPT.removeprefix("python ")
TOKENS = torch.randint(0, GPT2_TOKENIZER.size, (2, 16), generator=torch.Generator().manual_seed(5))
Tensors = dict[str, Tensor]


def nanogpt_tensors(rows: int = 50304, *, bias: bool = True) -> Tensors:
    """The state of a nanoGPT of that shape: names and layout as in its model.py."""
    generator = torch.Generator().manual_seed(4)
    width = SHAPE.n_embd
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (rows, width), "wpe.weight": (SHAPE.context_length, width)}
    norms = [f"h.{layer}.{name}" for layer in range(SHAPE.n_layer) for name in ("ln_1", "ln_2")]
    matrices = {"attn.c_attn": (3, 1), "attn.c_proj": (1, 1), "mlp.c_fc": (4, 1), "mlp.c_proj": (1, 4)}
    for name in [*norms, "ln_f"]:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for layer in range(SHAPE.n_layer):
        for name, (out, inner) in matrices.items():
            shapes |= {
                f"h.{layer}.{name}.weight": (out * width, inner * width),
                f"h.{layer}.{name}.bias": (out * width,),
            }
    tensors = {
        f"transformer.{name}": torch.randn(shape, generator=generator) * 0.1 + 0.5 * (len(shape) == 1)
        for name, shape in shapes.items()
        if bias or not name.endswith("bias")
    }
    return tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}


@torch.no_grad()
def nanogpt_logits(tensors: Tensors, approximate: str) -> Tensor:
    """Its forward pass, written out as in its model.py."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"transformer.{name}.weight"], tensors.get(f"transformer.{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = tensors[f"transformer.{name}.weight"], tensors.get(f"transformer.{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    x = tensors["transformer.wte.weight"][TOKENS] + tensors["transformer.wpe.weight"][: TOKENS.shape[1]]
    B, T, C = x.shape  # noqa: N806
    for layer in range(SHAPE.n_layer):
        parts = linear(norm(x, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(C, dim=2)
        q, k, v = (part.view(B, T, SHAPE.n_head, C // SHAPE.n_head).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + linear(attended, f"h.{layer}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"), approximate=approximate)
        x = x + linear(hidden, f"h.{layer}.mlp.c_proj")
    return F.linear(norm(x, "ln_f"), tensors["lm_head.weight"])[..., : GPT2_TOKENIZER.size]


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the script as a program of its own, in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@torch.no_grad()
def logits_of(model: GPT2) -> Tensor:
    return model.logits(model.hidden(TOKENS))[..., : GPT2_TOKENIZER.size]


SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 50304}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_checkpoint_of_nanogpt_becomes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bias: bool, prefix: str
) -> None:
    tensors = nanogpt_tensors(bias=bias)
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}  # of old ones
    state = {prefix + name: tensor for name, tensor in (tensors | masks).items()}
    arguments = {**SIZES, "bias": bias, "dropout": 0.0}
    torch.save(
        {"model": state, "optimizer": {}, "model_args": arguments, "iter_num": 9, "config": {}}, tmp_path / "ckpt.pt"
    )
    run_script(monkeypatch, str(tmp_path / "ckpt.pt"), str(tmp_path / "mine"))
    said = capsys.readouterr().out
    assert (
        "section model: {architecture: gpt2, n_layer: 2, n_head: 2, n_embd: 8, context_length: 16, init_from: " in said
    )
    assert "nanoGPT's GELU is exact" in said
    ours = logits_of(import_model(tmp_path / "mine", GPT2_TOKENIZER))
    assert (ours - nanogpt_logits(tensors, "tanh")).abs().max() < 1e-5
    difference = (ours - nanogpt_logits(tensors, "none")).abs().max()
    assert 1e-6 < difference < 0.02 * ours.std()


def test_a_checkpoint_of_build_nanogpt_becomes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config is an object of a class of the training script."""
    kind = type("GPTConfig", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", kind, raising=False)
    config = kind()
    vars(config).update(SIZES)
    tensors = nanogpt_tensors()
    torch.save({"model": tensors, "config": config, "step": 9, "val_loss": 3.3}, tmp_path / "model_00009.pt")
    run_script(monkeypatch, str(tmp_path / "model_00009.pt"), str(tmp_path / "mine"))
    assert "exact" not in capsys.readouterr().out
    assert (
        logits_of(import_model(tmp_path / "mine", GPT2_TOKENIZER)) - nanogpt_logits(tensors, "tanh")
    ).abs().max() < 1e-5


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["model"].pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content["model_args"].update(vocab_size=65), "vocab_size: 65; GPT-2's is 50257"),
        (lambda content: content["model_args"].update(n_layer=None), "n_layer: None is empty"),
        (lambda content: content["model_args"].update(n_embd=10), "other tensors than a GPT-2 of its sizes (h.0.attn"),
        (lambda content: content.pop("model_args"), "n_layer: None is empty"),
        (lambda content: content.pop("model"), "other tensors than a GPT-2 of its sizes"),
        (without("transformer.wpe.weight"), "of its sizes (wpe.weight)"),
        (lambda content: content["model"].update(more=torch.ones(3)), "of its sizes (more)"),
        (lambda content: content["model"].update({"lm_head.weight": torch.ones(50304, 8)}), "lm_head.weight of its own"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    content: dict[str, Any] = {"model": nanogpt_tensors(), "model_args": dict(SIZES)}
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit) as caught:
        run_script(monkeypatch, str(tmp_path / "ckpt.pt"), str(tmp_path / "mine"))
    assert words in str(caught.value)
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02cos\nsystem\n.", None])
def test_a_checkpoint_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(SystemExit, match="is not a checkpoint that can be read"):
        run_script(monkeypatch, str(tmp_path / "ckpt.pt"), str(tmp_path / "mine"))


def typed(command: str, *arguments: str) -> None:
    """Run what a message tells to type."""
    words = shlex.split(command)
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:], *arguments], check=True, capture_output=True)


@pytest.mark.long
def test_the_commands_of_the_messages_make_folders_that_can_be_read(tmp_path: Path) -> None:
    """`pytorch_model.bin`, and a vocabulary with a token added; both as the messages have them."""
    from transformers import GPT2LMHeadModel

    model = random_model(SHAPE, tokenizer=GPT2_TOKENIZER)
    export_model(model, GPT2_TOKENIZER, tmp_path / "mine", {})
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "mine")
    torch.save(theirs.state_dict(), tmp_path / "mine/pytorch_model.bin")
    (tmp_path / "mine" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=re.escape(f"`{CONVERT} {tmp_path / 'mine'}`")):
        import_model(tmp_path / "mine", GPT2_TOKENIZER)
    theirs.resize_token_embeddings(GPT2_TOKENIZER.size + 1)
    theirs.save_pretrained(tmp_path / "padded")
    command = f"{resize_command(GPT2_TOKENIZER)} {tmp_path / 'padded'} {tmp_path / 'padded'}-50257"
    with pytest.raises(UserError, match=re.escape(f"`{command}`")):
        import_model(tmp_path / "padded", GPT2_TOKENIZER)
    typed(CONVERT, str(tmp_path / "mine"))
    typed(resize_command(GPT2_TOKENIZER), str(tmp_path / "padded"), str(tmp_path / "padded-50257"))
    for name in ("mine", "padded-50257"):
        assert torch.equal(logits_of(import_model(tmp_path / name, GPT2_TOKENIZER)), logits_of(model))


def test_the_guide_names_the_commands() -> None:
    text = (CHECKOUT / GUIDE).read_text(encoding="utf-8")
    for command in (CONVERT, resize_command(GPT2_TOKENIZER), NANOGPT):
        assert command in text
