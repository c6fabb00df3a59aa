"""Validation loss: the mean cross-entropy over tokens that the model was not trained on."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipelib.model.decoder import Decoder
from pipelib.model.device import exactly, inference
from pipelib.tokens.loader import Batch

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Inputs and targets, each (B, T) -> the loss of every target, (B, T)."""


@dataclass(frozen=True)
class Loss:
    """A loss as a sum over tokens, so that the sums of several ranks can be added."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The number of equally likely tokens that gives the same loss; infinite if a float cannot hold it."""
        try:
            return math.exp(self.mean)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """The loss per byte of text, which does not depend on the vocabulary."""
        return self.nats / math.log(2) / text_bytes


def summed_loss(
    model: Decoder, batches: Iterable[Batch], precision: str, token_losses: TokenLosses | None = None
) -> Loss:
    """The loss over all targets of `batches`, summed in 64 bits; see `losses_of_rows`."""
    nats, tokens = losses_of_rows(model, batches, precision, token_losses=token_losses)
    return Loss(float(nats.sum()), int(tokens.sum()))


def losses_of_rows(
    model: Decoder,
    batches: Iterable[Batch],
    precision: str,
    advance: Callable[[int], object] = lambda _: None,
    token_losses: TokenLosses | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The summed loss of every row of `batches` in nats, and its number of tokens, each (rows,).

    Args:
        advance: progress callback, called with the number of tokens just scored.
        token_losses: computes the losses of a batch; None for the model's own, without a compiler.
    """
    device, token_losses = model.device, token_losses or model.token_losses
    nats: list[torch.Tensor] = []
    tokens: list[int] = []
    for inputs, targets in batches:
        with inference(device, precision):
            losses = token_losses(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        nats.append(exactly(losses).sum(dim=1))
        tokens += [targets.shape[1]] * len(targets)
        advance(targets.size)
    return torch.cat(nats or [torch.zeros(0, dtype=torch.float64)]).cpu().numpy(), np.array(tokens, np.int64)
