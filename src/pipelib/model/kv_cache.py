"""Keys and values of a batch of texts, kept, so that one more token costs one position and not all of them again.

Training does not use this: `GPT.forward` keeps its causal kernel and its static shapes.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelib.model.gpt import GPT


class KVCache:
    """The keys and values of every text so far.

    Texts are padded on the left, so that all of them go on in the same column. The first token of each has position 0,
    whatever its padding, and no text looks at padding. The padding looks at itself, since the softmax of nothing would
    be NaN.
    """

    def __init__(self, model: GPT, columns: int) -> None:
        """Args:
        columns: room for so many tokens, padding included.
        """
        self._model, self._columns = model, columns
        self._device = model.wte.weight.device
        self._texts: list[int] = []
        self._padding = torch.empty(0)  # (B,), of the texts in this order
        self._length = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        """Per block keys and values, (B, n_head, columns, head_size) each."""

    @torch.no_grad()
    def last_hidden(self, texts: Mapping[int, Sequence[int]]) -> Tensor:
        """What the network makes of the last token of every text: (B, C).

        Args:
            texts: token ids, no more than a context, by a name of each text. After the first call each is one token
                longer than before, and some may be left out, for good.
        """
        if self._texts:
            self._drop_all_but(texts)
            return self._extend(torch.tensor([[text[-1]] for text in texts.values()], device=self._device))
        longest = max(map(len, texts.values()))
        self._texts = list(texts)
        self._padding = torch.tensor([longest - len(text) for text in texts.values()], device=self._device)
        padded = [[0] * (longest - len(text)) + list(text) for text in texts.values()]
        return self._extend(torch.tensor(padded, device=self._device))

    def _drop_all_but(self, texts: Mapping[int, object]) -> None:
        rows = [row for row, text in enumerate(self._texts) if text in texts]
        if len(rows) < len(self._texts):
            self._texts, self._padding = list(texts), self._padding[rows]
            self._kept = [(keys[rows], values[rows]) for keys, values in self._kept]

    def _extend(self, inputs: Tensor) -> Tensor:
        """Run the network on the next T tokens of every text: (B, T) -> (B, C), of the last of them."""
        start, self._length = self._length, self._length + inputs.shape[1]
        columns = torch.arange(self._length, device=self._device)
        positions = (columns[start:] - self._padding[:, None]).clamp(min=0)  # (B, T)
        mask = self._mask(columns, start) if self._padding.any() else None
        causal = mask is None and inputs.shape[1] > 1

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = self._store(layer, start, key, value)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=causal)

        return self._model.hidden(inputs, positions, attend)[:, -1]

    def _mask(self, columns: Tensor, start: int) -> Tensor:
        """Which columns each new one looks at: (B, 1, T, columns)."""
        rows = columns[start:, None]  # (T, 1)
        text = columns >= self._padding[:, None, None]  # (B, 1, columns)
        return ((columns <= rows) & text | (columns == rows))[:, None]

    def _store(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new columns and return all of them, the new ones last."""
        if layer == len(self._kept):
            shape = (*key.shape[:2], self._columns, key.shape[3])
            self._kept.append((key.new_empty(shape), value.new_empty(shape)))
        keys, values = self._kept[layer]
        keys[:, :, start : self._length], values[:, :, start : self._length] = key, value
        return keys[:, :, : self._length], values[:, :, : self._length]
