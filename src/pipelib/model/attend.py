"""Attention: which positions a position attends to. Training, generation and scoring differ in nothing else.

A family's forward pass calls `attend(layer, query, key, value)` in each layer; positions see each other in no other way. So
each family has one forward pass. Training passes `causal`, `kv_cache.py` attends to cached keys, and in
`evaluation/endings.py` several endings share one context.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, query (B, n_head, T, head_size), key and value (B, n_kv_head, T, head_size) -> output, of the query's shape."""


def causal(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position attends to itself and to the positions before it."""
    return attention(query, key, value, is_causal=True)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scaled dot-product attention. With fewer key heads than query heads, neighboring query heads share a key head.

    Args:
        mask: which keys each query attends to, broadcast to (B, n_head, T, keys); None for all keys, or with `is_causal`.
    """
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=shared)
