"""Score how likely a model finds the possible endings of a text. Every benchmark is scored this way.

A question is a context and one or more endings. Its context is computed once: the context and its endings share one row, where
each ending attends only to the context and to itself, and takes the positions after the context's. The output layer runs only
on the positions that predict a token of an ending. For the first 1,000 items of HellaSwag's validation set that is 77
positions per item instead of 153, 53 of them with logits: 2.2 times fewer operations at 124M (docs/log.md has the time).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.attend import attention
from pipelib.model.decoder import LOGIT_ROWS, Decoder
from pipelib.model.device import inference

TokenIds = Sequence[int]
Question = tuple[TokenIds, Sequence[TokenIds]]
"""A context and its endings, of one token or more each."""


@dataclass(frozen=True)
class EndingScore:
    """A model's score of an ending."""

    losses: npt.NDArray[np.float64]
    """The loss of every token in nats."""
    greedy: bool
    """Whether greedy decoding would give this ending; False unless `with_greedy` is set."""


@dataclass(frozen=True)
class _Row:
    """A row of the network's input: a context and some of its endings, or a piece of one ending."""

    question: int
    endings: Sequence[int]
    """The indices of its endings in the question."""
    context: TokenIds
    tokens: Sequence[TokenIds]
    """The tokens of each of its endings."""
    first: int = 0
    """Where a piece starts in its ending."""

    @property
    def length(self) -> int:
        """Positions in the row. An ending's last token is predicted but predicts nothing, so it has none."""
        return len(self.context) + sum(len(tokens) - 1 for tokens in self.tokens)


def score_endings(
    model: Decoder,
    questions: Sequence[Question],
    batch_tokens: int,
    precision: str,
    advance: Callable[[int], object] = lambda _: None,
    *,
    with_greedy: bool = False,
) -> list[list[EndingScore]]:
    """Score every ending of every question.

    A context that is too long for the model loses its start. An ending that is too long is scored in pieces, each with only
    the token before it as its context.

    Args:
        batch_tokens: positions of one forward pass, padding included; this limits the memory.
        advance: progress callback, called with the number of ending tokens just scored.
        with_greedy: also find which endings greedy decoding gives; takes a few percent more time.

    Raises:
        UserError: the model's losses are not finite.
    """
    rows = [row for number, question in enumerate(questions) for row in _rows_of(number, question, model, batch_tokens)]
    # Rows with one ending are batched apart, since they need no mask. The longest come first, so that running out of memory
    # shows at once.
    rows.sort(key=lambda row: (len(row.tokens) > 1, row.length), reverse=True)
    pieces: list[list[dict[int, EndingScore]]] = [[{} for _ in endings] for _, endings in questions]
    for batch in _batches(rows, batch_tokens):
        for row, scores in zip(batch, _score_rows(model, batch, precision, with_greedy), strict=True):
            for ending, score in zip(row.endings, scores, strict=True):
                pieces[row.question][ending][row.first] = score
        advance(sum(len(tokens) for row in batch for tokens in row.tokens))
    return [[_join([found[first] for first in sorted(found)]) for found in endings] for endings in pieces]


def _join(pieces: Sequence[EndingScore]) -> EndingScore:
    if len(pieces) == 1:
        return pieces[0]
    return EndingScore(np.concatenate([piece.losses for piece in pieces]), all(piece.greedy for piece in pieces))


def _rows_of(number: int, question: Question, model: Decoder, batch_tokens: int) -> Iterator[_Row]:
    """Put a question's endings into few rows, none longer than the model's context. A cut ending gets rows of its own."""
    context, endings = question
    limit = model.params.context_length
    shared: _Row | None = None
    for index, ending in enumerate(endings):
        if len(context) + len(ending) - 1 > limit:
            for first in range(0, len(ending), limit):
                piece = ending[first : first + limit]
                before = context if first == 0 else ending[first - 1 : first]
                yield _Row(number, [index], before[-(limit + 1 - len(piece)) :], [piece], first)
        elif shared and shared.length + len(ending) - 1 <= min(limit, batch_tokens):
            shared = _Row(number, [*shared.endings, index], context, [*shared.tokens, ending])
        else:
            if shared:
                yield shared
            shared = _Row(number, [index], context, [ending])
    if shared:
        yield shared


def _batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Cut the sorted rows into batches of at most `batch_tokens` positions, padding included, never mixing the two kinds."""
    batch: list[_Row] = []
    for row in rows:
        full = batch and (len(batch) + 1) * batch[0].length > batch_tokens
        if full or (batch and (len(batch[0].tokens) > 1) != (len(row.tokens) > 1)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_rows(model: Decoder, rows: Sequence[_Row], precision: str, with_greedy: bool) -> list[list[EndingScore]]:
    """Score the endings of all rows in one forward pass. Padding is on the right, where no other position attends to it."""
    # Lay out each row as context, endings, padding; note the positions that predict each token of each ending.
    device = model.device
    width = max(row.length for row in rows)
    inputs = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    parts = np.full((len(rows), width), -1, np.int64)  # 0 is the context, 1 and on are endings, -1 is padding
    predicting: list[npt.NDArray[np.int64]] = []  # flat indices into the batch
    for line, row in enumerate(rows):
        end = len(row.context)
        inputs[line, :end], positions[line, :end], parts[line, :end] = row.context, np.arange(end), 0
        for number, tokens in enumerate(row.tokens, start=1):
            start, end = end, end + len(tokens) - 1
            inputs[line, start:end], parts[line, start:end] = tokens[:-1], number
            positions[line, start:end] = len(row.context) + np.arange(end - start)
            predicting.append(line * width + np.array([len(row.context) - 1, *range(start, end)]))
    # Endings share the context's last position, so each position is listed once.
    unique, of_target = np.unique(np.concatenate(predicting), return_inverse=True)
    targets = np.concatenate([tokens for row in rows for tokens in row.tokens])
    with inference(device, precision):
        if all(len(row.tokens) == 1 for row in rows):
            hidden = model.hidden(torch.from_numpy(inputs).to(device))
        else:
            arrays = (torch.from_numpy(array).to(device) for array in (inputs, positions, parts))
            hidden = _hidden_of_parts(model, *arrays)
        # Logits are expensive: compute them only at the predicting positions.
        hidden = hidden.flatten(0, 1)[torch.from_numpy(unique).to(device)]
        losses, greedy = _losses(model, hidden, of_target, targets, with_greedy)
    ends = np.cumsum([len(tokens) for row in rows for tokens in row.tokens])[:-1]
    scores = iter(
        [
            EndingScore(values, bool(hits.all()))
            for values, hits in zip(np.split(losses, ends), np.split(greedy, ends), strict=True)
        ]
    )
    return [[next(scores) for _ in row.tokens] for row in rows]


def _hidden_of_parts(model: Decoder, inputs: Tensor, positions: Tensor, parts: Tensor) -> Tensor:
    """`Decoder.hidden` where a position attends only to its context and its own ending: (B, T) three times -> (B, T, C)."""
    before = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool, device=inputs.device).tril()
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    mask = (seen & before)[:, None]  # (B, 1, T, T)

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, mask)

    return model.hidden(inputs, positions, attend)


def _losses(
    model: Decoder,
    hidden: Tensor,
    of_target: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    with_greedy: bool,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """The loss of every target in nats, and whether no token is likelier.

    Args:
        hidden: the hidden state of every predicting position (N, C).
        of_target: the index of the position that predicts each target (M,).
    """
    device = hidden.device
    losses, greedy = np.zeros(len(targets)), np.zeros(len(targets), np.bool_)
    for start in range(0, len(hidden), LOGIT_ROWS):
        logits = model.exact_logits(hidden[start : start + LOGIT_ROWS])
        mine = np.flatnonzero((of_target >= start) & (of_target < start + LOGIT_ROWS))
        rows = torch.from_numpy(of_target[mine] - start).to(device)
        wanted = torch.from_numpy(targets[mine]).to(device)
        losses[mine] = -logits.log_softmax(dim=-1)[rows, wanted].cpu().double().numpy()
        if with_greedy:
            greedy[mine] = (logits[rows, wanted] == logits.amax(dim=-1)[rows]).cpu().numpy()
    if not np.isfinite(losses).all():
        raise UserError(
            "the model's losses are not finite, so it cannot be scored; its weights are unusable: train it again."
        )
    return losses, greedy
