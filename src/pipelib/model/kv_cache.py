"""A key-value cache for several texts: one more token costs one position, not the whole text again.

Each text has a row, with its first token in column 0. Texts may join and leave between any two tokens. Training does not use it:
it keeps `causal`, with its kernel and static shapes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipelib.model.attend import attention, causal
from pipelib.model.decoder import Decoder

FEW, TILE = 4, 16


class KVCache:
    """The keys and values of several texts."""

    def __init__(self, model: Decoder, rows: int, columns: int, *, fixed_shapes: bool = False) -> None:
        """Args:
        rows: the most texts at a time.
        columns: space for this many tokens of each. It grows if more are needed.
        fixed_shapes: compute all rows and columns always. A batch of another shape rounds otherwise; so with one thread the
            logits of a text are then the same to the bit, whatever texts are beside it.
        """
        self._model, self._rows, self._columns, self._fixed = model, rows, columns, fixed_shapes
        self._lengths: list[int] = []
        """The tokens of each text."""
        self._layers: list[tuple[Tensor, Tensor]] = []
        """Keys and values of each layer, (rows, n_kv_head, columns, head_size) each."""

    def __len__(self) -> int:
        return len(self._lengths)

    @torch.no_grad()
    def add(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Run new texts, at most `context_length` tokens each, in rows after those that are there.

        Returns:
            The logits of the token after each, (texts, padded vocab_size), in fp32.
        """
        if self._fixed and len(texts) > 1:
            return torch.cat([self.add([text]) for text in texts])
        lengths, first = list(map(len, texts)), len(self)
        longest = max(lengths)
        # Shorter texts are padded on the right, where none of their tokens looks.
        inputs = self._tensor([[*text, *[0] * (longest - len(text))] for text in texts])
        self._reserve(longest)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            for kept, new in zip(self._layer(layer, key), (key, value), strict=True):
                kept[first : first + len(texts), :, :longest] = new
            return causal(layer, query, key, value)

        hidden = self._model.hidden(inputs, attend=attend)
        self._lengths += lengths
        last = self._tensor(lengths) - 1
        return self._model.exact_logits(hidden[torch.arange(len(texts), device=last.device), last])

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run the next token of every text.

        Returns:
            The logits of the token after it, (texts, padded vocab_size), in fp32.
        """
        count = self._rows if self._fixed else self._fast_count(len(tokens))
        unused = [0] * (count - len(tokens))
        rows, ends = torch.arange(count, device=self._model.device), self._tensor([*self._lengths, *unused])
        self._lengths = [length + 1 for length in self._lengths]
        self._reserve(max(self._lengths))
        columns = self._columns if self._fixed else max(self._lengths)
        # The fastest kernels take no mask.
        needs_mask = self._fixed or min(self._lengths) < columns
        mask = (torch.arange(columns, device=rows.device) <= ends[:, None])[:, None, None] if needs_mask else None

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._layer(layer, key)
            keys[rows, :, ends], values[rows, :, ends] = key[:, :, 0], value[:, :, 0]
            return attention(query, keys[:count, :, :columns], values[:count, :, :columns], mask)

        hidden = self._model.hidden(self._tensor([*tokens, *unused])[:, None], ends[:, None], attend)
        return self._model.exact_logits(hidden[:, 0])[: len(tokens)]

    def _fast_count(self, texts: int) -> int:
        """How many rows to compute. MKL multiplies 16 rows by a large matrix faster than 5 to 15."""
        return texts if texts <= FEW else min(-(-texts // TILE) * TILE, self._rows)

    def remove(self, row: int) -> None:
        """Forget a text. The last text takes its row."""
        last = len(self) - 1
        for kept in (tensor for layer in self._layers for tensor in layer):
            kept[row] = kept[last]
        self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self._model.device)

    def _reserve(self, columns: int) -> None:
        if columns > self._columns:
            self._columns = 2 * columns

    def _layer(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, with space for all columns."""
        if layer == len(self._layers):
            shape = (self._rows, key.shape[1], self._columns, key.shape[3])
            self._layers.append((key.new_zeros(shape), key.new_zeros(shape)))  # what is masked must be finite too
        keys, values = self._layers[layer]
        if keys.shape[2] < self._columns:
            more = (0, 0, 0, self._columns - keys.shape[2])
            keys, values = self._layers[layer] = pad(keys, more), pad(values, more)
        return keys, values
