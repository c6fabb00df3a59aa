"""Estimate a training's memory, and find the largest micro-batch that fits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipelib.errors import UserError
from pipelib.files import format_bytes, plural
from pipelib.model.device import free_memory
from pipelib.model.params import ModelParams
from pipelib.training.params import TrainParams
from pipelib.vocabulary.tokenizer import padded_size

NCCL_BYTES = 10**9
"""What the connections between GPUs take on each, about."""
USABLE = 0.9
"""The share of free memory that an estimate may fill; the allocator and the kernels need the rest."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank needs on its GPU, or in main memory if it has none."""

    weights: int
    gradients: int
    moments: int
    """The optimizer's state."""
    copies: int
    """bf16 or fp16 copies of the matrices, which autocast keeps until the backward pass is done."""
    activations: int
    """What the layers save for the backward pass."""
    logits: int
    """The output layer at its peak."""

    @property
    def total(self) -> int:
        """The sum. The allocator and the kernels need about 10 % more."""
        return self.weights + self.gradients + self.moments + self.copies + self.activations + self.logits


@dataclass(frozen=True)
class Footprint:
    """A training's memory, known before it starts."""

    model: ModelParams
    vocab_size: int
    train: TrainParams
    world_size: int = 1
    """Ranks in the training."""
    trained: int | None = None
    """Numbers that are trained; None for all. The rest has no gradients, no moments and no place in checkpoints."""

    @property
    def parameters(self) -> int:
        """Numbers in the weights, the vocabulary's padding included."""
        return self.model.parameters(padded_size(self.vocab_size))

    @property
    def trained_parameters(self) -> int:
        """Of `parameters`, those that change."""
        return self.parameters if self.trained is None else self.trained

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: on disk, and in rank 0's main memory while it is written."""
        return 4 * self.trained_parameters + self._moments

    @property
    def _moments(self) -> int:
        """Bytes of the optimizer's state: AdamW keeps two numbers for a parameter, Muon one for a number in a block's matrix."""
        fewer = self.model.matrix_parameters(vocab_size=0) if self.train.optimizer == "muon" else 0
        return 8 * self.trained_parameters - 4 * fewer

    def memory(self, rows: int, length: int = 0) -> Memory:
        """Memory for a micro-batch of `rows` rows of `length` tokens.

        Weights and gradients take 4 bytes per parameter each, AdamW's moments 8. If gradients accumulate over micro-steps, there
        are two of each: a compiled backward pass returns all of them at once, and DDP keeps those of its buckets. The family
        says what its layers keep for the backward pass (`ModelParams.activation_bytes`).

        The output layer peaks in the backward pass, padding included. There the log-probabilities, their gradient and the
        logits' gradient exist at once: 3 fp32 numbers for each logit of a token. torch.compile keeps only the logits and their
        gradient, in the precision of the product: `bench/memory.py` compares with what it really keeps.

        Args:
            length: tokens in a row; 0 for `train.sequence_length`.
        """
        train = self.train
        tokens, half = rows * (length or train.sequence_length), train.precision != "fp32"
        accumulates = train.rows_per_step // self.world_size > rows
        twice = accumulates and (train.compile or self.world_size > 1)
        logit_bytes = (4 if half else 8) if train.compile else 12
        return Memory(
            weights=4 * self.parameters,
            gradients=(8 if twice else 4) * self.trained_parameters,
            moments=self._moments,
            copies=2 * self.model.matrix_parameters(self.vocab_size) if half else 0,
            activations=tokens * self.model.activation_bytes(half, train.activation_checkpointing),
            logits=tokens * padded_size(self.vocab_size) * logit_bytes,
        )

    def free_per_rank(self, device: torch.device, local_ranks: int) -> int:
        """Bytes that are free for one rank before it allocates anything.

        The ranks of a CPU machine share its memory equally, after the copy that checkpoints need.
        """
        if device.type == "cuda":
            return free_memory(device)
        # Only rank 0 holds the copy, but the ranks share one memory, so all must leave room for it.
        return max(0, free_memory(device) - self.checkpoint) // local_ranks

    def rows_that_fit(self, free: int, below: int = 0) -> int:
        """The largest micro-batch, in rows, that fits into `free` bytes and divides a rank's share of a step; 0 if none fits.

        Args:
            free: bytes for everything that `memory` counts.
            below: consider only micro-batches smaller than this.
        """
        share = self.train.rows_per_step // self.world_size
        candidates = divisors(share, below or share + 1)
        return next((rows for rows in candidates if self.memory(rows).total <= USABLE * free), 0)

    @contextmanager
    def explain_out_of_memory(self, free: int) -> Iterator[None]:
        """Turn an out-of-memory error in this block into a message that names a micro-batch that would fit.

        While `micro_batch_size` is still `auto`, one row is assumed.

        Args:
            free: bytes that were free for the training before it began.

        Raises:
            UserError: instead of torch's or Python's own error.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):  # torch raises RuntimeError for many other reasons
                raise
            raise UserError(self._what_would_fit(free, error)) from None

    def _what_would_fit(self, free: int, error: MemoryError | RuntimeError) -> str:
        rows = 1 if self.train.micro_batch_size == "auto" else self.train.micro_batch_rows(self.world_size)
        need = format_bytes(self.memory(rows).total)
        said = (str(error).splitlines() or [""])[0][:200]  # torch appends advice about its allocator
        fit = self.rows_that_fit(free, below=rows)
        section = self.train.section
        cheaper = f"; {section}.activation_checkpointing: true needs less too"
        checkpointing = "" if self.train.activation_checkpointing else cheaper
        if fit:
            less = format_bytes(self.memory(fit).total)
            remedy = f"{section}.micro_batch_size: {fit} would fit, with about {less}{checkpointing}."
        else:
            smaller = f"lower {section}.sequence_length or the model's size"
            remedy = f"no smaller micro-batch would fit: {smaller}{checkpointing}."
        return (
            f"out of memory ({said}): a micro-batch of {plural(rows, 'row')} of {self.train.sequence_length:,} tokens needs "
            f"about {need} and {format_bytes(free)} were free, so training stopped; {remedy}"
        )


def divisors(share: int, below: int) -> list[int]:
    """The divisors of `share` that are less than `below`, the largest first."""
    return [rows for rows in range(min(share, below - 1), 0, -1) if share % rows == 0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the machine."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in str(error)  # torch's allocator on a CPU
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)  # cuBLAS, on a GPU that is full
    )
