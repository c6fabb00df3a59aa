"""GPT-2 as published: pre-LayerNorm blocks, tanh-GELU, learned positions, output tied to the token embedding.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019; https://github.com/openai/gpt-2. The only
addition is the padding of the vocabulary, from 50,257 to 50,304 rows, for the sake of the hardware; the padding always has
probability zero.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelib.model.params import ModelParams
from pipelib.vocabulary.tokenizer import padded_size

INIT_STD = 0.02
LOGIT_ROWS = 8192
"""Positions whose logits are there at a time where no gradient needs them all: 1.6 GB in fp32, twice that with their softmax."""


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, query, key and value -> attended, (B, n_head, T, head_size) each."""


def causal(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position looks at itself and at what came before it."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class CausalSelfAttention(nn.Module):
    """Every position looks at itself and at what came before it."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.n_head = params.n_head
        self.c_attn = nn.Linear(params.n_embd, 3 * params.n_embd)
        self.c_proj = nn.Linear(params.n_embd, params.n_embd)

    def forward(self, x: Tensor, layer: int = 0, attend: Attend = causal) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.merge_heads(attend(layer, *self.split_heads(x)))

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, C) -> query, key and value, each (B, n_head, T, head_size)."""
        B, T, C = x.shape  # noqa: N806
        qkv: Tensor = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        return qkv.unbind(0)

    def merge_heads(self, attended: Tensor) -> Tensor:
        """(B, n_head, T, head_size) -> (B, T, C)."""
        out: Tensor = self.c_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Four times as wide inside."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.c_fc = nn.Linear(params.n_embd, 4 * params.n_embd)
        self.c_proj = nn.Linear(4 * params.n_embd, params.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(params.n_embd)
        self.attn = CausalSelfAttention(params)
        self.ln_2 = nn.LayerNorm(params.n_embd)
        self.mlp = MLP(params)

    def forward(self, x: Tensor, layer: int = 0, attend: Attend = causal) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attn(self.ln_1(x), layer, attend)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """The network. Parameters carry the names that GPT-2 and Hugging Face give them."""

    def __init__(self, params: ModelParams, vocab_size: int) -> None:
        super().__init__()
        self.params, self.vocab_size = params, vocab_size
        self.wte = nn.Embedding(padded_size(vocab_size), params.n_embd)
        self.wpe = nn.Embedding(params.context_length, params.n_embd)
        self.h = nn.ModuleList(Block(params) for _ in range(params.n_layer))
        self.ln_f = nn.LayerNorm(params.n_embd)
        self.activation_checkpointing = False
        """Keep each block's input only and compute the block again in the backward pass."""

    def hidden(self, inputs: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """What the network makes of each position, before the output layer: (B, T) token ids -> (B, T, C)."""
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.wte(inputs) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block, x, layer, attend, use_reentrant=False, preserve_rng_state=False
                )  # blocks draw nothing
            else:
                x = block(x, layer, attend)
        out: Tensor = self.ln_f(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., padded vocab_size), with minus infinity for the padding, which so has probability zero."""
        logits = F.linear(hidden, self.wte.weight)
        logits[..., self.vocab_size :] = -math.inf  # set, not cut off, so that the product keeps its good shape
        return logits

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """`logits` in fp32 also within autocast: bf16 tells logits near -100 apart by halves only, so the likeliest tokens tie
        and losses are off by a tenth of a nat."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.logits(hidden.float())

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats of predicting `targets` (B, T) from `inputs` (B, T), a scalar."""
        logits = self.logits(self.hidden(inputs).flatten(0, 1))  # (B·T, padded vocab_size)
        return F.cross_entropy(logits.float(), targets.flatten())

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy in nats of every target, (B, T), by `exact_logits`, `LOGIT_ROWS` positions at a time."""
        hidden, wanted = self.hidden(inputs).flatten(0, 1), targets.flatten()
        parts = [slice(start, start + LOGIT_ROWS) for start in range(0, len(wanted), LOGIT_ROWS)]
        losses = [F.cross_entropy(self.exact_logits(hidden[part]), wanted[part], reduction="none") for part in parts]
        return torch.cat(losses).view(targets.shape)


def initialise(model: GPT, seed: int) -> None:
    """Fill in GPT-2's initial weights, the same for every device and number of ranks.

    Normal with standard deviation 0.02; projections into the residual stream are scaled by (2·n_layer)^-0.5, since that
    many of them add up; biases are zero and LayerNorms the identity. The loss then starts near ln(vocab_size): 10.82 for
    50,257 tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = INIT_STD * (2 * model.params.n_layer) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.wte.weight[model.vocab_size :] = 0.0
