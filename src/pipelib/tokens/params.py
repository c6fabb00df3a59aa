"""The parameters of the tokenize stage."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelib.schema import Bounds


@dataclass(frozen=True)
class TokenizeParams:
    """Section `tokenize` of params.yaml."""

    shard_tokens: Annotated[int, Bounds(minimum=1024, maximum=2**31 - 1)]
    """Tokens in every shard but the last; the first shard is the validation split."""
    dedup: Literal["none", "exact"]
    """`exact` leaves out every document whose text equals that of an earlier document."""
