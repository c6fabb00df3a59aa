"""A key-value cache for a batch of texts: one more token costs one position, not the whole text again.

Texts may join and leave between any two tokens. Training does not use it: it keeps `causal`, with its kernel and static shapes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipelib.model.attend import attention
from pipelib.model.decoder import Decoder


class KVCache:
    """The keys and values of several texts, whose number may change from call to call."""

    def __init__(self, model: Decoder, columns: int) -> None:
        """Args:
        columns: space for this many tokens per text, padding included. The cache grows if more are needed.
        """
        self._model, self._columns = model, columns
        self._texts: list[int] = []
        self._rows: _Rows | None = None
        """One row for each of `_texts`, in the same order."""

    @torch.no_grad()
    def last_hidden(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """The final hidden state of the last token of every text: (B, C).

        Args:
            texts: token ids by the name of each text, at most `context_length` of them. A text of the previous call must now be
                one token longer; other texts are new, and missing ones are forgotten.
        """
        known = [name for name in self._texts if name in texts]
        new = [name for name in texts if name not in self._texts]
        hidden: list[Tensor] = []
        # Known texts run their one new token, new texts their whole prompt; then both share one batch.
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
            self._rows = self._rows.merged(rows) if known and self._rows else rows
        self._texts = [*known, *new]
        if self._texts == list(texts):
            return torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        return torch.cat(hidden)[[self._texts.index(name) for name in texts]]

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._model.device)


class _Rows:
    """Texts padded on the left, so that all of them continue in the same column.

    The first token of each has position 0, whatever its padding, and no text attends to padding. Padding attends to itself,
    since a softmax over nothing would be NaN.
    """

    def __init__(self, model: Decoder, columns: int, padding: Tensor) -> None:
        """Args:
        padding: columns of padding of each text (B,).
        """
        self._model, self._columns, self._padding = model, columns, padding
        self._length = 0
        """Filled columns."""
        self._layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, (B, n_kv_head, columns, head_size) each."""

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self._padding = self._padding[rows]
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]

    def merged(self, others: "_Rows") -> "_Rows":
        """These texts followed by the others, shifted right so that all of them end in the same column."""
        length = max(self._length, others._length)
        padding = torch.cat([rows._padding + length - rows._length for rows in (self, others)])
        unused = int(padding.min())  # all texts have padding there, since the longest one has left
        both = _Rows(self._model, max(self._columns, length), padding - unused)
        both._length = length - unused

        def shifted(rows: _Rows, cached: Tensor) -> Tensor:
            margins = (0, 0, length - rows._length, both._columns - both._length)
            return pad(cached[:, :, : rows._length], margins)[:, :, unused:]

        for mine, theirs in zip(self._layers, others._layers, strict=True):
            keys, values = (
                torch.cat([shifted(self, a), shifted(others, b)]) for a, b in zip(mine, theirs, strict=True)
            )
            both._layers.append((keys, values))
        return both

    def extend(self, inputs: Tensor) -> Tensor:
        """Run the network on the next T tokens of every text: (B, T) -> (B, C), the last token's hidden state."""
        start, self._length = self._length, self._length + inputs.shape[1]
        columns = torch.arange(self._length, device=inputs.device)
        positions = (columns[start:] - self._padding[:, None]).clamp(min=0)  # (B, T)
        mask = self._mask(columns, start) if self._padding.any() else None  # the fastest kernels take no mask
        is_causal = mask is None and inputs.shape[1] > 1

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._store(layer, start, key, value)
            return attention(query, keys, values, mask, is_causal)

        return self._model.hidden(inputs, positions, attend)[:, -1]

    def _mask(self, columns: Tensor, start: int) -> Tensor:
        """Which columns each new column attends to: (B, 1, T, columns)."""
        rows = columns[start:, None]  # (T, 1)
        text = columns >= self._padding[:, None, None]  # (B, 1, columns)
        return ((columns <= rows) & text | (columns == rows))[:, None]

    def _store(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new columns and return all columns, the new ones last."""
        self._columns = self._columns if self._length <= self._columns else 2 * self._length
        if layer == len(self._layers):
            shape = (*key.shape[:2], self._columns, key.shape[3])
            self._layers.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self._layers[layer]
        if keys.shape[2] < self._columns:
            more = (0, 0, 0, self._columns - keys.shape[2])
            keys, values = self._layers[layer] = pad(keys, more), pad(values, more)
        keys[:, :, start : self._length], values[:, :, start : self._length] = key, value
        return keys[:, :, : self._length], values[:, :, : self._length]
