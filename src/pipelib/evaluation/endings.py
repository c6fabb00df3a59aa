"""How likely a model finds what may follow a text: the one way in which every benchmark here is scored.

A question is a context and one or more endings. Its context is computed once: context and endings lie in one row, where
each ending looks at the context and at itself alone, and takes the positions that follow the context's. The output layer sees
what predicts a token of an ending and nothing else. For the first 1,000 items of HellaSwag's validation set that
is 77 positions an item instead of 153, 53 of them with logits: 2.2 times fewer operations at 124M (docs/log.md has the time).
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
from pipelib.model.device import autocast

Tokens = Sequence[int]
Question = tuple[Tokens, Sequence[Tokens]]
"""A context of one token or more, and endings of one token or more."""


@dataclass(frozen=True)
class EndingScore:
    """What a model makes of an ending."""

    losses: npt.NDArray[np.float64]
    """In nats, of every token."""
    greedy: bool
    """Whether the model finds no token likelier than each of these; False where nobody asked."""


@dataclass(frozen=True)
class _Row:
    """A context and some of its endings, as they go through the network."""

    question: int
    endings: Sequence[int]
    """Which of the question's endings."""
    context: Tokens
    tokens: Sequence[Tokens]
    """Of each ending."""
    first: int = 0
    """Where in its ending a piece starts."""

    @property
    def length(self) -> int:
        """Positions; an ending's last token is predicted and predicts nothing."""
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
    """The scores of every ending of every question.

    A context that is too long for the model loses its start. An ending that is, is scored in pieces, each after the token
    before it.

    Args:
        batch_tokens: positions of one forward pass, padding included; what bounds the memory.
        advance: is told how many more tokens of endings are done.
        with_greedy: find out which endings are greedy, for a few percent of the time.

    Raises:
        UserError: the model's logits are not numbers.
    """
    rows = [row for number, question in enumerate(questions) for row in _rows_of(number, question, model, batch_tokens)]
    # those alone in their row need no mask, and the longest come first: where memory is too small, it shows at once
    rows.sort(key=lambda row: (len(row.tokens) > 1, row.length), reverse=True)
    pieces: list[list[dict[int, EndingScore]]] = [[{} for _ in endings] for _, endings in questions]
    for batch in _batches(rows, batch_tokens):
        for row, scores in zip(batch, _score_rows(model, batch, precision, with_greedy), strict=True):
            for ending, score in zip(row.endings, scores, strict=True):
                pieces[row.question][ending][row.first] = score
        advance(sum(len(tokens) for row in batch for tokens in row.tokens))
    return [[_join([found[first] for first in sorted(found)]) for found in of_endings] for of_endings in pieces]


def _join(pieces: Sequence[EndingScore]) -> EndingScore:
    if len(pieces) == 1:
        return pieces[0]
    return EndingScore(np.concatenate([piece.losses for piece in pieces]), all(piece.greedy for piece in pieces))


def _rows_of(number: int, question: Question, model: Decoder, batch_tokens: int) -> Iterator[_Row]:
    """As few rows as hold the endings, none longer than the model's context, and rows of their own for what must be cut."""
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
    """Runs of rows of one kind, the longest first, that padded to it make at most `batch_tokens` tokens."""
    batch: list[_Row] = []
    for row in rows:
        full = batch and (len(batch) + 1) * batch[0].length > batch_tokens
        if full or (batch and (len(batch[0].tokens) > 1) != (len(row.tokens) > 1)):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _score_rows(model: Decoder, rows: Sequence[_Row], precision: str, with_greedy: bool) -> list[list[EndingScore]]:
    """The scores of each row's endings, in one forward pass. Padding stands on the right, where nothing that counts sees it."""
    device = model.device
    width = max(row.length for row in rows)
    inputs = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    parts = np.full((len(rows), width), -1, np.int64)  # 0 is the context, 1 and on are endings, -1 is padding
    places: list[npt.NDArray[np.int64]] = []  # of what predicts each token of each ending, counted over the whole batch
    for line, row in enumerate(rows):
        end = len(row.context)
        inputs[line, :end], positions[line, :end], parts[line, :end] = row.context, np.arange(end), 0
        for number, tokens in enumerate(row.tokens, start=1):
            start, end = end, end + len(tokens) - 1
            inputs[line, start:end], parts[line, start:end] = tokens[:-1], number
            positions[line, start:end] = len(row.context) + np.arange(end - start)
            places.append(line * width + np.array([len(row.context) - 1, *range(start, end)]))
    counted, of_target = np.unique(
        np.concatenate(places), return_inverse=True
    )  # endings share the context's last place
    targets = np.concatenate([tokens for row in rows for tokens in row.tokens])
    with autocast(device, precision):
        if all(len(row.tokens) == 1 for row in rows):
            hidden = model.hidden(torch.from_numpy(inputs).to(device))
        else:
            arrays = (torch.from_numpy(array).to(device) for array in (inputs, positions, parts))
            hidden = _hidden_of_parts(model, *arrays)
        hidden = hidden.flatten(0, 1)[torch.from_numpy(counted).to(device)]
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
    """`Decoder.hidden` where a place sees the context before it and its own part, (B, T) three times -> (B, T, C)."""
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
        hidden: of every place that predicts something (N, C).
        of_target: which of them predicts each target (M,).
    """
    device = hidden.device
    losses, greedy = np.zeros(len(targets)), np.zeros(len(targets), np.bool_)
    for start in range(0, len(hidden), LOGIT_ROWS):
        logits = model.exact_logits(hidden[start : start + LOGIT_ROWS])
        mine = np.flatnonzero((of_target >= start) & (of_target < start + LOGIT_ROWS))
        rows = torch.from_numpy(of_target[mine] - start).to(device)
        wanted = torch.from_numpy(targets[mine]).to(device)
        losses[mine] = -logits.log_softmax(dim=-1)[rows, wanted].double().cpu().numpy()
        if with_greedy:
            greedy[mine] = (logits[rows, wanted] == logits.amax(dim=-1)[rows]).cpu().numpy()
    if not np.isfinite(losses).all():
        raise UserError(
            "the model gives losses that are not finite, so it has no accuracy; its weights are lost: train anew."
        )
    return losses, greedy
