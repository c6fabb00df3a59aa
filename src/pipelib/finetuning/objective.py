"""The objective of fine-tuning: the nats of the answers alone, each conversation of a row by itself."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelib.evaluation.loss import Loss
from pipelib.finetuning.packing import IGNORED
from pipelib.model.attend import Attend, attention, causal
from pipelib.model.decoder import LOGIT_ROWS, Decoder
from pipelib.model.device import exactly, inference
from pipelib.training.objectives import Objective


class Answers(Objective):
    """Predict the tokens of answers from what is before them in the same conversation."""

    def __init__(self, model: Decoder, *, packed: bool) -> None:
        """Args:
        packed: whether rows hold several conversations. With one in each row, the fast kernels for causal attention suffice.
        """
        super().__init__(model)
        self.packed = packed

    def forward(self, inputs: Tensor, targets: Tensor, *more: Tensor) -> Tensor:
        """See `Objective.forward`; `more` are the positions, (B, T)."""
        hidden, wanted = self._hidden(inputs, *more).flatten(0, 1), targets.flatten()
        if not torch.compiler.is_compiling():  # a compiler wants to know how many there are
            counted = wanted != IGNORED
            hidden, wanted = hidden[counted], wanted[counted]
        logits = self.model.logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a test computes in float64
        return F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")

    def _hidden(self, inputs: Tensor, positions: Tensor) -> Tensor:
        return self.model.hidden(inputs, positions, within_conversations(positions) if self.packed else causal)

    def target_count(self, targets: Tensor) -> int:
        """Those that are not masked."""
        return int((targets != IGNORED).sum())

    def dummy_batch(self, rows: int, length: int) -> tuple[Tensor, ...]:
        """See `Objective.dummy_batch`. One conversation fills each row."""
        inputs, targets = super().dummy_batch(rows, length)
        return inputs, targets, torch.arange(length).repeat(rows, 1)

    def loss(self, batch: tuple[npt.NDArray[np.int64], ...], precision: str) -> Loss:
        """The exact loss of a batch, without gradients."""
        device = self.model.device
        inputs, targets, positions = (torch.from_numpy(array).to(device) for array in batch)
        with inference(device, precision):
            counted = targets != IGNORED
            hidden, wanted = self._hidden(inputs, positions)[counted], targets[counted]
            parts = [slice(start, start + LOGIT_ROWS) for start in range(0, max(1, len(wanted)), LOGIT_ROWS)]
            losses = [
                F.cross_entropy(self.model.exact_logits(hidden[part]), wanted[part], reduction="none") for part in parts
            ]
        return Loss(float(exactly(torch.cat(losses)).sum()), int(counted.sum()))


def within_conversations(positions: Tensor) -> Attend:
    """Every position attends to itself and to those before it in its own conversation, which begins where positions are 0.

    Args:
        positions: (B, T).
    """
    conversation = (positions == 0).cumsum(1)
    mask = (conversation[:, :, None] == conversation[:, None, :]).tril()[:, None]  # (B, 1, T, T)

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, mask)

    return attend
