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
    """What the layers save for the backward pass."""
    logits: int
    """The output layer at its peak."""

    @property
    def total(self) -> int:
        """All of it; the allocator and kernels want some 10 % on top."""
        return self.weights + self.gradients + self.moments + self.copies + self.activations + self.logits


@dataclass(frozen=True)
class Footprint:
    """What a training takes of memory, known before it begins."""

    model: ModelParams
    vocab_size: int
    train: TrainParams

    @property
    def parameters(self) -> int:
        """Trainable numbers in memory and checkpoints: with the vocabulary's padding."""
        return self.model.parameters(padded_size(self.vocab_size))

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: on disk, and in the main memory of the first rank while it is written."""
        return CHECKPOINT_BYTES * self.parameters

    def memory(self, rows: int, length: int = 0) -> Memory:
        """What `rows` rows of `length` tokens need at a time, without torch.compile, which saves less.

        Weights and gradients take 4 bytes a parameter, moments 8. What the layers keep for the backward pass is the family's to
        say (`ModelParams.activation_bytes`). The output layer peaks in the backward pass, with the log-probabilities, their
        gradient and the logits' gradient alive at once: 3 fp32 numbers for each logit of a token, the padding's included.

        Args:
            length: 0 for `train.sequence_length`.
        """
        tokens, bf16 = rows * (length or self.train.sequence_length), self.train.precision == "bf16"
        return Memory(
            weights=4 * self.parameters,
            gradients=4 * self.parameters,
            moments=8 * self.parameters,
            copies=2 * self.model.matrix_parameters(self.vocab_size) if bf16 else 0,
            activations=tokens * self.model.activation_bytes(bf16, self.train.activation_checkpointing),
            logits=tokens * padded_size(self.vocab_size) * 12,
        )

    def free_per_rank(self, device: torch.device, local_ranks: int) -> int:
        """Bytes that one of so many ranks on this machine has, before it holds anything: on a CPU an equal share of what the
        copy for checkpoints leaves.
        """
        if device.type == "cuda":
            return free_memory(device)
        return max(0, free_memory(device) - self.checkpoint) // local_ranks

    def rows_that_fit(self, world_size: int, free: int, below: int = 0) -> int:
        """The most rows of a micro-batch, a divisor of a rank's share of a step, that `free` bytes hold; 0 where none do.

        Args:
            free: what is there for everything that `memory` counts.
            below: look at smaller ones only.
        """
        share = self.train.rows_per_step // world_size
        candidates = divisors(share, below or share + 1)
        return next((rows for rows in candidates if self.memory(rows).total <= USABLE * free), 0)

    @contextmanager
    def explain_out_of_memory(self, world_size: int, free: int) -> Iterator[None]:
        """Have running out of memory in this block say which micro-batch would fit.

        As long as `micro_batch_size` is `auto`, not even one row's worth is known to fit.

        Args:
            free: bytes that were there for the training before it began.

        Raises:
            UserError: in the place of torch's or Python's own error.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(self._what_would_fit(world_size, free, error)) from None

    def _what_would_fit(self, world_size: int, free: int, error: MemoryError | RuntimeError) -> str:
        rows = 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_rows(world_size)
        need = format_bytes(self.memory(rows).total)
        said = (str(error).splitlines() or [""])[0][:200]
        fit = self.rows_that_fit(world_size, free, below=rows)
        checkpointing = (
            "" if self.train.activation_checkpointing else "; train.activation_checkpointing: true needs less too"
        )
        if fit:
            less = format_bytes(self.memory(fit).total)
            remedy = f"train.micro_batch_size: {fit} would fit, with about {less}{checkpointing}."
        else:
            remedy = (
                f"no smaller micro-batch would fit: lower train.sequence_length or the model's size{checkpointing}."
            )
        return (
            f"out of memory ({said}): a micro-batch of {rows} rows of {self.train.sequence_length:,} tokens needs about {need} "
            f"and {format_bytes(free)} were free, so the training stopped; {remedy}"
        )


def divisors(share: int, below: int) -> list[int]:
    """Every divisor of `share` that is less than `below`, the greatest first."""
    return [rows for rows in range(min(share, below - 1), 0, -1) if share % rows == 0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)  # torch's allocator on a CPU
    )
