"""The parameters of the tokenize stage."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelib.schema import Bounds

MIN_SHARD, SMALL_SHARD, LARGE_SHARD = 1024, 256_000, 100_000_000
"""The fewest tokens of a shard; those of a shard of a small and of a large corpus."""


@dataclass(frozen=True)
class TokenizeParams:
    """Section `tokenize` of params.yaml."""

    shard_tokens: Annotated[int, Bounds(minimum=MIN_SHARD, maximum=2**31 - 1)] | Literal["auto"]
    """Tokens in every shard but the last; the first shard is the validation split. `auto`: see `shard_size`."""
    dedup: Literal["none", "exact"]
    """`exact` leaves out every document whose text equals that of an earlier document."""

    def shard_size(self, tokens: int, at_least: int = 0) -> int:
        """Return the tokens in a shard. `auto` takes 256,000, but at most a tenth of the corpus, and at most 256 shards of it.

        Args:
            tokens: of the corpus.
            at_least: for `auto`: the benchmark's documents need this many.
        """
        if self.shard_tokens != "auto":
            return self.shard_tokens
        return min(LARGE_SHARD, max(MIN_SHARD, min(SMALL_SHARD, tokens // 10), tokens // 256, at_least))
