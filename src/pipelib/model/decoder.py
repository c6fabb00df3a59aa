"""The base class of all model families: output layer, token losses, initialization, Hugging Face's format.

A family is a subclass in `families/NAME.py`. It implements `hidden` and `head` and names its tensors; then training,
generation, scoring, export and import work with it. Its parameters are in `shapes/`; `attend.py` explains `attend`.
"""

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from pipelib.model.attend import Attend, causal
from pipelib.model.params import ModelParams, family_params
from pipelib.schema import parse

INIT_STD = 0.02
LOGIT_ROWS = 8192
"""Positions whose logits exist at the same time, without gradients: 1.6 GB in fp32, and twice that with their softmax."""
HEAD = "lm_head.weight"
"""Hugging Face's name for the output layer."""


def family_of(name: str) -> "type[Decoder]":
    """The network class of a family."""
    found: type[Decoder] = importlib.import_module(f"pipelib.model.families.{name}").DECODER
    return found


def build(params: ModelParams, vocab_size: int) -> "Decoder":
    """Make a model with these parameters. Its weights are not set yet.

    torch's layers would draw initial weights of their own, which takes a minute for a large model and which nothing uses.
    """
    with _NoDraws():
        return family_of(params.architecture)(params, vocab_size)


class _NoDraws(TorchFunctionMode):
    """Leave out what `nn.init` draws. (On the device "meta" layers have no memory, but they import torch's compiler.)"""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", "") == nn.init.__name__ else func(*args, **kwargs)


class Decoder(nn.Module, ABC):
    """A language model: token ids in, the likelihood of the next token out."""

    architecture: ClassVar[str]
    """The family's name: of its files, in `model.architecture`, and as `model_type` in config.json."""
    embedding_names: tuple[str, ...]
    """The tensors with one row per token, padding included. The first one is the input embedding."""

    def __init__(self, params: ModelParams, vocab_size: int) -> None:
        super().__init__()
        self.params, self.vocab_size = params, vocab_size
        self.activation_checkpointing = False
        """Keep only each block's input, and compute the block again in the backward pass."""
        self.bf16_residual = False
        """Keep the residual stream in bf16 (`train.experiments`)."""
        self.separate_qkv = False
        """Compute query, key and value by three products (`train.experiments`)."""

    # ---- The network -------------------------------------------------------------------------------------------------

    @abstractmethod
    def hidden(self, inputs: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """Final hidden states, before the output layer: (B, T) token ids -> (B, T, C).

        Args:
            positions: of each token in its text, (B, T) or (T,); None for 0, 1, 2, ...
            attend: the only way in which positions see each other.
        """

    @property
    @abstractmethod
    def head(self) -> Tensor:
        """The output layer's weight, (padded vocab_size, C)."""

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Run a block, with activation checkpointing if it is on. The block must not draw random numbers."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            kept: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            return kept
        out: Tensor = block(*inputs)
        return out

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.device

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., padded vocab_size). The padding gets minus infinity, so its probability is zero."""
        logits = F.linear(hidden, self.head)  # padding is not sliced off: a padded matrix product is faster on a GPU
        if torch.compiler.is_compiling():
            # Out of place: the backward pass then keeps the product, which is in memory anyway, and not the masked copy.
            # Without a compiler this would be slower: it writes all of the logits, and the line below only the padding.
            return logits.masked_fill(torch.arange(len(self.head), device=logits.device) >= self.vocab_size, -math.inf)
        logits[..., self.vocab_size :] = -math.inf
        return logits

    def exact_logits(self, hidden: Tensor) -> Tensor:
        """`logits` in fp32, also under autocast.

        Near -100, bf16 has a spacing of 0.5, so the likeliest tokens would tie and losses would be off by about 0.1 nats.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self.logits(hidden.float())

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The cross-entropy of every target in nats: (B, T) twice -> (B, T).

        It uses `exact_logits`, for `LOGIT_ROWS` positions at a time.
        """
        hidden, wanted = self.hidden(inputs).flatten(0, 1), targets.flatten()
        parts = [slice(start, start + LOGIT_ROWS) for start in range(0, len(wanted), LOGIT_ROWS)]
        losses = [F.cross_entropy(self.exact_logits(hidden[part]), wanted[part], reduction="none") for part in parts]
        return torch.cat(losses).view(targets.shape)

    # ---- Initial weights ---------------------------------------------------------------------------------------------

    projection_names: ClassVar[tuple[str, ...]] = ()
    """Name endings of the matrices that write into the residual stream."""

    def initialise(self, seed: int, *, zero_projections: bool = False) -> None:
        """Set the initial weights, the same on every device and for any number of ranks.

        Matrices are normal with standard deviation `initial_std`, biases are zero, and norms are the identity. The loss then
        starts near ln(vocab_size): 10.82 for GPT-2's 50,257 tokens.

        Args:
            zero_projections: start with `projection_names`, and an output layer that is not tied, at zero: no block changes
                anything yet, and the loss is ln(vocab_size).
        """
        zeros = (*self.projection_names, HEAD) if zero_projections else ()
        # Numbers are drawn on the CPU, in the order of the parameters: no device or rank changes them.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if zeros and name.endswith(zeros):
                    parameter.zero_()
                elif parameter.dim() >= 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * self.initial_std(name))
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            for name in self.embedding_names:
                self.get_parameter(name)[self.vocab_size :] = 0.0

    def initial_std(self, name: str) -> float:  # noqa: ARG002 (families override it)
        """The standard deviation of the initial weights of the matrix `name`."""
        return INIT_STD

    # ---- Hugging Face's form -----------------------------------------------------------------------------------------

    name_prefix: ClassVar[str] = ""
    """The prefix of Hugging Face's tensor names, before ours."""
    transposed_names: ClassVar[tuple[str, ...]] = ()
    """Name endings of the matrices that Hugging Face stores as (in, out); ours are (out, in)."""
    derived_names: ClassVar[tuple[str, ...]] = ()
    """Name endings of tensors that some files contain although they follow from the others; see `derived_problem`."""
    stacked_names: ClassVar[Mapping[str, int]] = {}
    """Name endings of parameters that are several matrices, one below another, and how many: Muon takes them apart."""
    block_list: ClassVar[tuple[str, str] | None] = None
    """The name of the list of blocks, and the parameter that gives its length."""
    config_settings: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    """Allowed values of settings in config.json, the default first. Another value means another architecture."""

    @classmethod
    def config(cls, params: ModelParams, vocab_size: int, end_token_id: int) -> dict[str, Any]:
        """The content of config.json for an exported model."""
        shape = {key: value for key, value in asdict(params).items() if key not in ("architecture", "init_from")}
        ends = {"bos_token_id": end_token_id, "eos_token_id": end_token_id}
        return {"model_type": cls.architecture, **shape, **ends, "dtype": "float32", "vocab_size": vocab_size}

    @classmethod
    def params_of(cls, config: Mapping[str, Any], problems: list[str]) -> ModelParams | None:
        """Read the parameters from config.json. What is wrong is added to `problems`; None if they cannot be read."""
        kind = family_params(cls.architecture)
        values = {entry.name: config.get(entry.name) for entry in fields(kind)}
        return parse(kind, {**values, "architecture": cls.architecture}, "", problems)

    @classmethod
    def outer_shapes(cls, params: ModelParams, rows: int) -> dict[str, tuple[int, ...]]:  # noqa: ARG003
        """Shapes that show whether config.json and the file agree, before a model of that size is made.

        Args:
            rows: the rows of the token embedding.
        """
        return {}

    @classmethod
    def other_layout(cls, params: ModelParams, shapes: Mapping[str, tuple[int, ...]]) -> str:  # noqa: ARG003
        """The remedy if the shapes in a file are another program's layout; empty otherwise."""
        return ""

    def derived_problem(self, name: str, tensor: Tensor) -> str:
        """Why a derived tensor does not follow from the others, and the remedy; empty if it does."""
        if name != HEAD:
            return ""
        # A file may hold the tied head as a second tensor. It must equal the embedding, except for padding rows.
        embedding = self.get_parameter(self.embedding_names[0])[: self.vocab_size]
        same = tensor.shape[1:] == embedding.shape[1:] and len(tensor) >= self.vocab_size
        if same and torch.equal(tensor[: self.vocab_size].to(embedding.dtype), embedding):
            return ""
        return (
            f"is not the token embedding, so the model has a separate head, which {self.params.title} does not have and this "
            "code would ignore; use a model whose head is tied to the embedding."
        )
