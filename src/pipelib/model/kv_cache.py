"""Keys and values of a batch of texts, kept, so that one more token costs one position and not all of them again.

Texts may join and leave between any two tokens. Training does not use this: it keeps `causal`, with its kernel and its
static shapes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipelib.model.attend import attention
from pipelib.model.decoder import Decoder


class KVCache:
    """The keys and values of every text so far."""

    def __init__(self, model: Decoder, columns: int) -> None:
        """Args:
        columns: room for so many tokens, padding included; where more are needed, it grows.
        """
        self._model, self._columns = model, columns
        self._texts: list[int] = []
        self._rows: _Rows | None = None
        """Of the texts in this order."""

    @torch.no_grad()
    def last_hidden(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """The final hidden state of the last token of every text: (B, C).

        Args:
            texts: token ids, no more than a context, by a name of each text. One that was there in the call before is one token
                longer now, one that was not is new, and one that is missing is forgotten.
        """
        known = [name for name in self._texts if name in texts]
        new = [name for name in texts if name not in self._texts]
        hidden: list[Tensor] = []
        if known and self._rows:
            if len(known) < len(self._texts):
                self._rows.keep([row for row, name in enumerate(self._texts) if name in texts])
            hidden.append(self._rows.extend(self._tensor([[texts[name][-1]] for name in known])))
        if new:
            longest = max(len(texts[name]) for name in new)
            padding = [longest - len(texts[name]) for name in new]
            rows = _Rows(self._model, self._columns, self._tensor(padding))
            padded = [[0] * count + list(texts[name]) for name, count in zip(new, padding, strict=True)]
            hidden.append(rows.extend(self._tensor(padded)))
            self._rows = self._rows.joined(rows) if known and self._rows else rows
        self._texts = [*known, *new]
        if self._texts == list(texts):
            return torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        return torch.cat(hidden)[[self._texts.index(name) for name in texts]]

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._model.device)


class _Rows:
    """Texts padded on the left, so that all of them continue in the same column.

    The first token of each has position 0, whatever its padding, and no text looks at padding. The padding looks at itself,
    since the softmax of nothing would be NaN.
    """

    def __init__(self, model: Decoder, columns: int, padding: Tensor) -> None:
        """Args:
        padding: of each text, in columns (B,).
        """
        self._model, self._columns, self._padding = model, columns, padding
        self._length = 0
        """Columns that are filled."""
        self._kept: list[tuple[Tensor, Tensor]] = []
        """Per layer keys and values, (B, n_kv_head, columns, head_size) each."""

    def keep(self, rows: list[int]) -> None:
        """Forget the other texts."""
        self._padding = self._padding[rows]
        self._kept = [(keys[rows], values[rows]) for keys, values in self._kept]

    def joined(self, others: "_Rows") -> "_Rows":
        """These texts and then the others, moved to the right so that all of them end in the same column."""
        length = max(self._length, others._length)
        padding = torch.cat([rows._padding + length - rows._length for rows in (self, others)])
        unused = int(padding.min())  # columns of padding alone, where the longest text has left
        both = _Rows(self._model, max(self._columns, length), padding - unused)
        both._length = length - unused

        def moved(rows: _Rows, kept: Tensor) -> Tensor:
            beside = (0, 0, length - rows._length, both._columns - both._length)
            return pad(kept[:, :, : rows._length], beside)[:, :, unused:]

        for mine, theirs in zip(self._kept, others._kept, strict=True):
            keys, values = (torch.cat([moved(self, a), moved(others, b)]) for a, b in zip(mine, theirs, strict=True))
            both._kept.append((keys, values))
        return both

    def extend(self, inputs: Tensor) -> Tensor:
        """Run the network on the next T tokens of every text: (B, T) -> (B, C), of the last of them."""
        start, self._length = self._length, self._length + inputs.shape[1]
        columns = torch.arange(self._length, device=inputs.device)
        positions = (columns[start:] - self._padding[:, None]).clamp(min=0)  # (B, T)
        mask = self._mask(columns, start) if self._padding.any() else None
        is_causal = mask is None and inputs.shape[1] > 1

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._store(layer, start, key, value)
            return attention(query, keys, values, mask, is_causal)

        return self._model.hidden(inputs, positions, attend)[:, -1]

    def _mask(self, columns: Tensor, start: int) -> Tensor:
        """Which columns each new one looks at: (B, 1, T, columns)."""
        rows = columns[start:, None]  # (T, 1)
        text = columns >= self._padding[:, None, None]  # (B, 1, columns)
        return ((columns <= rows) & text | (columns == rows))[:, None]

    def _store(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new columns and return all of them, the new ones last."""
        self._columns = self._columns if self._length <= self._columns else 2 * self._length
        if layer == len(self._kept):
            shape = (*key.shape[:2], self._columns, key.shape[3])
            self._kept.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self._kept[layer]
        if keys.shape[2] < self._columns:
            more = (0, 0, 0, self._columns - keys.shape[2])
            keys, values = self._kept[layer] = pad(keys, more), pad(values, more)
        keys[:, :, start : self._length], values[:, :, start : self._length] = key, value
        return keys[:, :, : self._length], values[:, :, : self._length]
