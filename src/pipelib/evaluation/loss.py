"""Validation loss: the mean cross-entropy over tokens the model was not trained on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pipelib.model.device import autocast
from pipelib.model.gpt import GPT
from pipelib.tokens.loader import Batch


@dataclass(frozen=True)
class Loss:
    """A summed loss, so that shares of it can be added."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model hesitates between."""
        return math.exp(self.mean)

    def bits_per_byte(self, text_bytes: int) -> float:
        """The loss per byte of text, which does not depend on the vocabulary."""
        return self.nats / math.log(2) / text_bytes


@torch.no_grad()
def summed_loss(model: GPT, batches: Iterable[Batch], precision: str) -> Loss:
    """The loss over all targets of `batches`, each token's loss added in 64 bits."""
    device = model.wte.weight.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for inputs, targets in batches:
        with autocast(device, precision):
            losses = model.token_losses(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device))
        nats += losses.double().sum()
        tokens += targets.size
    return Loss(float(nats), tokens)
