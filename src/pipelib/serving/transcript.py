"""Tokens to the text that a client sees, in pieces that are final."""

import codecs
from collections.abc import Sequence

from pipelib.vocabulary.tokenizer import Tokenizer


class Transcript:
    """The text of one answer. A piece ends in no half character, and holds nothing that may become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held, self._stopped = "", False

    def add(self, token_id: int) -> str:
        """Return what is final after one more token. After a stop string, nothing is."""
        return self._final(self._decoder.decode(self._tokenizer.decode_bytes([token_id])), is_end=False)

    def end(self) -> str:
        """Return what is left."""
        return self._final(self._decoder.decode(b"", final=True), is_end=True)

    def _final(self, more: str, *, is_end: bool) -> str:
        if self._stopped:
            return ""
        self._held += more
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            piece, self._held, self._stopped = self._held[: min(places)], "", True
            return piece
        begun = [length for stop in self._stops for length in range(1, len(stop)) if self._held.endswith(stop[:length])]
        kept = len(self._held) - (0 if is_end else max(begun, default=0))
        piece, self._held = self._held[:kept], self._held[kept:]
        return piece
