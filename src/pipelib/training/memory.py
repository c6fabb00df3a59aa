"""The memory of a training by arithmetic, and the micro-batch that fits into what is there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipelib.errors import UserError
from pipelib.files import format_bytes
from pipelib.model.device import free_memory
from pipelib.model.params import ModelParams
from pipelib.training.params import TrainParams
from pipelib.vocabulary.tokenizer import padded_size

CHECKPOINT_BYTES = 12
"""Of one parameter: itself and Adam's two moments, in fp32."""
USABLE = 0.9
"""The share of free memory that an estimate may fill: the allocator and the kernels want the rest."""


def padded_parameters(model: ModelParams, vocab_size: int) -> int:
    """Trainable numbers in memory and checkpoints: with the vocabulary's padding."""
    return model.parameters(padded_size(vocab_size))


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs, in a GPU or, without one, in main memory."""

    weights: int
    gradients: int
    moments: int
    """AdamW's two."""
    copies: int
    """bf16 copies of the matrices, kept by autocast until the backward pass is through."""
    activations: int
    """What the blocks save for the backward pass."""
    logits: int
    """The output layer at its peak."""

    @property
    def total(self) -> int:
        """All of it; the allocator and kernels want some 10 % on top."""
        return self.weights + self.gradients + self.moments + self.copies + self.activations + self.logits


def memory_of(model: ModelParams, vocab_size: int, train: TrainParams, rows: int, length: int) -> Memory:
    """What `rows` rows of `length` tokens need at a time, without torch.compile, which saves less.

    Weights and gradients take 4 bytes a parameter, moments 8. What the layers keep for the backward pass is the family's to
    say (`ModelParams.activation_bytes`). The output layer peaks in the backward pass, with the log-probabilities, their
    gradient and the logits' gradient alive at once: 3 fp32 numbers for each logit of a token, the padding's included.
    """
    tokens, parameters, bf16 = rows * length, padded_parameters(model, vocab_size), train.precision == "bf16"
    return Memory(
        weights=4 * parameters,
        gradients=4 * parameters,
        moments=8 * parameters,
        copies=2 * model.matrix_parameters(vocab_size) if bf16 else 0,
        activations=tokens * model.activation_bytes(bf16, train.activation_checkpointing),
        logits=tokens * padded_size(vocab_size) * 12,
    )


def checkpoint_copy(model: ModelParams, vocab_size: int) -> int:
    """Bytes of main memory for the copy of the state that a checkpoint is written from, on the first rank."""
    return CHECKPOINT_BYTES * padded_parameters(model, vocab_size)


def memory_per_rank(model: ModelParams, vocab_size: int, device: torch.device, local_ranks: int) -> int:
    """Bytes that one of so many ranks on this machine has, before it holds anything: on a CPU an equal share of what the
    copy for checkpoints leaves.
    """
    if device.type == "cuda":
        return free_memory(device)
    return max(0, free_memory(device) - checkpoint_copy(model, vocab_size)) // local_ranks


def rows_that_fit(
    model: ModelParams, vocab_size: int, train: TrainParams, world_size: int, free: int, below: int = 0
) -> int:
    """The most rows of a micro-batch, a divisor of a rank's share of a step, that `free` bytes hold; 0 where none do.

    Args:
        free: what is there for everything that `memory_of` counts.
        below: look at smaller ones only.
    """
    share = train.rows_per_step // world_size
    smaller = divisors(share, below or share + 1)
    return next((rows for rows in smaller if _fits(model, vocab_size, train, rows, free)), 0)


def divisors(share: int, below: int) -> list[int]:
    """Every divisor of `share` that is less than `below`, the greatest first."""
    return [rows for rows in range(min(share, below - 1), 0, -1) if share % rows == 0]


def _fits(model: ModelParams, vocab_size: int, train: TrainParams, rows: int, free: int) -> bool:
    return memory_of(model, vocab_size, train, rows, train.sequence_length).total <= USABLE * free


@contextmanager
def explain_out_of_memory(
    model: ModelParams, vocab_size: int, train: TrainParams, world_size: int, free: int
) -> Iterator[None]:
    """Have running out of memory in this block say which micro-batch would fit.

    Args:
        train: with `micro_batch_size: auto` as long as not even one row's worth is known to fit.
        free: bytes that were there for the training before it began.

    Raises:
        UserError: in the place of torch's or Python's own error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(_what_would_fit(model, vocab_size, train, world_size, free, error)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)  # torch's allocator on a CPU
    )


def _what_would_fit(
    model: ModelParams,
    vocab_size: int,
    train: TrainParams,
    world_size: int,
    free: int,
    error: MemoryError | RuntimeError,
) -> str:
    rows = 1 if train.micro_batch_size == "auto" else train.micro_batch_rows(world_size)
    need = format_bytes(memory_of(model, vocab_size, train, rows, train.sequence_length).total)
    said = (str(error).splitlines() or [""])[0][:200]
    fit = rows_that_fit(model, vocab_size, train, world_size, free, below=rows)
    checkpointing = "" if train.activation_checkpointing else "; train.activation_checkpointing: true needs less too"
    if fit:
        less = format_bytes(memory_of(model, vocab_size, train, fit, train.sequence_length).total)
        remedy = f"train.micro_batch_size: {fit} would fit, with about {less}{checkpointing}."
    else:
        remedy = f"no smaller micro-batch would fit: lower train.sequence_length or the model's size{checkpointing}."
    return (
        f"out of memory ({said}): a micro-batch of {rows} rows of {train.sequence_length:,} tokens needs about {need} and "
        f"{format_bytes(free)} were free, so the training stopped; {remedy}"
    )
