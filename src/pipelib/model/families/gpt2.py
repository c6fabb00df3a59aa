"""GPT-2 as published: pre-LayerNorm blocks, tanh-GELU, learned positions, output tied to the token embedding.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019; https://github.com/openai/gpt-2. The only
addition is the padding of the vocabulary from 50,257 to 50,304 rows, which is faster on the hardware. The padding always has
probability zero.

Hugging Face keeps OpenAI's Conv1D layout, (in, out), while ours is torch's Linear, (out, in), so four matrices of every
block are transposed. For the square ones a mistake would show only in wrong results, so a test compares with transformers.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelib.model.attend import Attend, causal
from pipelib.model.decoder import HEAD, INIT_STD, Decoder
from pipelib.model.params import ModelParams
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.model.weights import GUIDE
from pipelib.schema import parse
from pipelib.vocabulary.tokenizer import padded_size


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to the positions before it."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.n_head = params.n_head
        self.c_attn = nn.Linear(params.n_embd, 3 * params.n_embd)
        self.c_proj = nn.Linear(params.n_embd, params.n_embd)

    def forward(self, x: Tensor, layer: int = 0, attend: Attend = causal, separate: bool = False) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape  # noqa: N806
        if separate:
            parts = zip(self.c_attn.weight.chunk(3), self.c_attn.bias.chunk(3), strict=True)
            heads = [F.linear(x, *part).view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in parts]
        else:
            # One product for query, key and value: (B, T, 3C) -> (3, B, n_head, T, head_size).
            qkv: Tensor = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
            heads = list(qkv.unbind(0))
        attended = attend(layer, *heads)  # (B, n_head, T, head_size)
        out: Tensor = self.c_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """A feed-forward layer, four times as wide inside."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.c_fc = nn.Linear(params.n_embd, 4 * params.n_embd)
        self.c_proj = nn.Linear(4 * params.n_embd, params.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, params: GPT2Params) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(params.n_embd)
        self.attn = CausalSelfAttention(params)
        self.ln_2 = nn.LayerNorm(params.n_embd)
        self.mlp = MLP(params)

    def forward(self, x: Tensor, layer: int = 0, attend: Attend = causal, separate: bool = False) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), layer, attend, separate)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(Decoder):
    """The network. Its tensors have the names that GPT-2 and Hugging Face give them."""

    architecture = "gpt2"
    embedding_names = ("wte.weight",)
    projection_names = ("c_proj.weight",)
    params: GPT2Params

    def __init__(self, params: GPT2Params, vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        self.wte = nn.Embedding(padded_size(vocab_size), params.n_embd)
        self.wpe = nn.Embedding(params.context_length, params.n_embd)
        self.h = nn.ModuleList(Block(params) for _ in range(params.n_layer))
        self.ln_f = nn.LayerNorm(params.n_embd)

    def hidden(self, inputs: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """See `Decoder.hidden`."""
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.wte(inputs) + self.wpe(positions)
        if self.bf16_residual:
            x = x.bfloat16()
        for layer, block in enumerate(self.h):
            x = self.run(block, x, layer, attend, self.separate_qkv)
        out: Tensor = self.ln_f(x)
        return out

    @property
    def head(self) -> Tensor:
        """Tied to the token embedding."""
        return self.wte.weight

    def initial_std(self, name: str) -> float:
        """0.02. Projections into the residual stream are scaled by (2·n_layer)^-0.5, since 2·n_layer of them add up."""
        return INIT_STD * (2 * self.params.n_layer) ** -0.5 if name.endswith(self.projection_names) else INIT_STD

    # ---- Hugging Face's form -----------------------------------------------------------------------------------------

    name_prefix = "transformer."
    transposed_names = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    derived_names = (HEAD, ".attn.bias", ".attn.masked_bias")  # the tied head, and causal masks
    stacked_names: ClassVar[Mapping[str, int]] = {"attn.c_attn.weight": 3}  # query, key and value
    block_list = ("h", "n_layer")
    config_settings: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    }

    @classmethod
    def config(cls, params: ModelParams, vocab_size: int, end_token_id: int) -> dict[str, Any]:
        """See `Decoder.config`. The keys are in the order of OpenAI's file."""
        assert isinstance(params, GPT2Params)
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "bos_token_id": end_token_id,
            "eos_token_id": end_token_id,
            "initializer_range": INIT_STD,
            "layer_norm_epsilon": 1e-5,
            "n_ctx": params.context_length,
            "n_embd": params.n_embd,
            "n_head": params.n_head,
            "n_inner": None,
            "n_layer": params.n_layer,
            "n_positions": params.context_length,
            "tie_word_embeddings": True,
            "dtype": "float32",
            "vocab_size": vocab_size,
        }

    @classmethod
    def params_of(cls, config: Mapping[str, Any], problems: list[str]) -> GPT2Params | None:
        """See `Decoder.params_of`."""
        keys = {"context_length": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}
        values = {ours: config.get(theirs) for ours, theirs in keys.items()}
        found: list[str] = []
        params = parse(GPT2Params, {"architecture": "gpt2", **values}, "", found)
        problems += [line.replace("context_length", "n_positions") for line in found]  # the file's name for it
        if params is not None and config.get("n_inner") not in (None, 4 * params.n_embd):
            problems.append(f"n_inner is {config['n_inner']}, not 4 times n_embd.")
        return params

    @classmethod
    def outer_shapes(cls, params: ModelParams, rows: int) -> dict[str, tuple[int, ...]]:
        """Both embeddings."""
        assert isinstance(params, GPT2Params)
        return {"wte.weight": (rows, params.n_embd), "wpe.weight": (params.context_length, params.n_embd)}

    @classmethod
    def other_layout(cls, params: ModelParams, shapes: Mapping[str, tuple[int, ...]]) -> str:
        """nanoGPT keeps matrices as torch's Linear does, (out, in)."""
        assert isinstance(params, GPT2Params)
        transposed = shapes.get("h.0.attn.c_attn.weight") == (3 * params.n_embd, params.n_embd)
        return f"its matrices have nanoGPT's layout: convert the checkpoint itself, see {GUIDE}" if transposed else ""

    def derived_problem(self, name: str, tensor: Tensor) -> str:
        """See `Decoder.derived_problem`. Masks must be causal."""
        if name == HEAD:
            return super().derived_problem(name, tensor)
        if _is_causal(tensor) if name.endswith(".attn.bias") else _is_minus_infinity(tensor):
            return ""
        return "is not the causal mask of GPT-2, so its attention differs from ours; use a GPT-2 as published."


DECODER = GPT2


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask (..., T, T) is 1 up to each position and 0 after it."""
    size = mask.shape[-1] if mask.dim() > 1 else 0
    return mask.numel() == size * size > 0 and torch.equal(
        mask.reshape(-1, size).to(torch.float32), torch.ones(mask.numel() // size, size).tril()
    )


def _is_minus_infinity(bias: Tensor) -> bool:
    """Whether this number, added to an attention score, leaves it no weight: -10,000 in OpenAI's files."""
    return bias.numel() == 1 and bias.item() <= -1e4
