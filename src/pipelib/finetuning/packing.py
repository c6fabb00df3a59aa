"""Rows of conversations: several in one row, which do not see each other, or one in each.

Best-fit decreasing: the longest conversation comes first, and each goes into the fullest row that has room. A row has an array
`positions` beside inputs and targets: positions begin with 0 in each conversation, which shows where it starts.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipelib.finetuning.dataset import Dataset

IGNORED = -100
"""The target of a token that does not count; torch's cross-entropy leaves it out."""

Row = list[int]
"""The numbers of the conversations in a row."""


def pack(lengths: npt.NDArray[np.int64], room: int) -> list[Row]:
    """Distribute conversations over rows.

    Args:
        lengths: places that each conversation takes, at most `room`.
        room: places of a row.
    """
    rows: list[Row] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    has_rows = 0
    """Bit r is set if a row has room for r more: the lowest set bit from a length on is the fullest row that fits."""
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        if fitting := has_rows >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            row = by_room[left].pop()
            if not by_room[left]:
                has_rows &= ~(1 << left)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(number)
        by_room[left - length].append(row)
        has_rows |= 1 << (left - length)
    return rows


class ConversationRows:
    """Rows of T tokens, by their number; see `RowSource`."""

    def __init__(self, dataset: Dataset, rows: Sequence[Row], length: int, padding: int) -> None:
        """Args:
        length: T.
        padding: the token of places after the last conversation; they count for nothing.
        """
        self._dataset, self._rows, self._length, self._padding = dataset, rows, length, padding

    @classmethod
    def of(
        cls, dataset: Dataset, numbers: npt.NDArray[np.int64], length: int, padding: int, *, packing: bool
    ) -> "ConversationRows":
        """The rows of some conversations of a dataset."""
        places = dataset.lengths[numbers] - 1  # the last token is only a target
        rows = pack(places, length) if packing else [[place] for place in range(len(numbers))]
        return cls(dataset, [numbers[row].tolist() for row in rows], length, padding)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the inputs, targets and positions of the given rows, each (rows, T)."""
        shape = len(indices), self._length
        inputs, targets = np.full(shape, self._padding, np.int64), np.full(shape, IGNORED, np.int64)
        positions = np.zeros(shape, np.int64)
        for place, index in enumerate(indices.tolist()):
            start = 0
            for number in self._rows[index]:
                tokens, mask = self._dataset.tokens(number), self._dataset.mask(number)
                here = slice(start, start + len(tokens) - 1)
                inputs[place, here] = tokens[:-1]
                targets[place, here] = np.where(mask[1:], tokens[1:], IGNORED)
                positions[place, here] = np.arange(len(tokens) - 1)
                start = here.stop
            positions[place, start:] = np.arange(self._length - start)
        return inputs, targets, positions
