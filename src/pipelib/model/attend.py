"""Attention: where a position looks, which is all that training, generation and scoring differ in.

A family's forward pass calls `attend(layer, query, key, value)` in each layer, and lets positions see each other in no other
way. So it is written once: `causal` is training's, `kv_cache.py` looks at keys that it kept, and `evaluation/endings.py` has
several endings share one context.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, query (B, n_head, T, head_size), key and value (B, n_kv_head, T, head_size) -> attended, of the query's shape."""


def causal(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every position looks at itself and at what came before it."""
    return attention(query, key, value, is_causal=True)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Scaled dot-product attention; with fewer keys than queries, neighbouring query heads share a key head.

    Args:
        mask: which keys each query looks at, broadcast to (B, n_head, T, keys); None for all, or for `is_causal`.
    """
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=shared)
