"""One thread that writes the texts of all clients together, one token of each in a step."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from pipelib.errors import UserError, tell
from pipelib.model.decoder import Decoder
from pipelib.model.device import inference
from pipelib.model.generate import GREEDY, Batch, Text
from pipelib.vocabulary.chat import ChatTemplate
from pipelib.vocabulary.tokenizer import Tokenizer


class BusyError(Exception):
    """The queue is full."""


class ClosedError(Exception):
    """The server ends."""


@dataclass(frozen=True)
class Drawn:
    """A token of a text."""

    token_id: int
    logprob: float
    """The logarithm of its probability, before temperature and all that `Sampling` does; 0 if nobody asked for it."""
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest tokens in its place, with theirs."""


@dataclass(eq=False, kw_only=True)
class Writing(Text):
    """A text that is written for a client."""

    tell: Callable[[Drawn | str | Exception], None]
    """Takes each token; in the end why the text has ended (`stop` or `length`), or what went wrong. The engine's thread "
    "calls it."""
    likeliest: int | None = None
    """For how many tokens the client wants to know the probability, beside that of the one that is drawn; None for no one."""
    cancelled: bool = False
    """Nobody waits for it any more."""

    def draw(self, logits: Tensor) -> int | None:
        """See `Text.draw`. The client is told."""
        try:
            token = super().draw(logits)
        except Exception as error:  # the others go on
            self.finished = "stop"
            self.tell(error)
            return None
        if token is not None:
            self.tell(self._drawn(token, logits))
        if self.finished:
            self.tell(self.finished)
        return token

    def _drawn(self, token: int, logits: Tensor) -> Drawn:
        if self.likeliest is None:
            return Drawn(token, 0.0, ())
        logprobs = logits.log_softmax(dim=-1)
        values, token_ids = logprobs.topk(min(self.likeliest, len(logits)))
        return Drawn(token, float(logprobs[token]), tuple(zip(token_ids.tolist(), values.tolist(), strict=True)))


@dataclass(frozen=True)
class Served:
    """A model that is served."""

    name: str
    """What clients call it."""
    model: Decoder
    tokenizer: Tokenizer
    template: ChatTemplate | None
    """None for a model that was not fine-tuned on conversations."""
    precision: str = "fp32"

    @property
    def context_length(self) -> int:
        """The most tokens of a text, its prompt included."""
        return self.model.params.context_length


@dataclass(eq=False)
class Engine:
    """Writes what is submitted. Texts join and leave between any two tokens."""

    served: Served
    slots: int
    """The most texts that are written at a time."""
    queue: int
    """The most texts that wait for a slot."""
    fixed_shapes: bool = False
    """See `KVCache`. With one thread, a text then depends on no other, to the bit."""
    _waiting: deque[Writing] = field(default_factory=deque)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._batch = self._empty_batch()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"engine {self.served.name}", daemon=True)

    def start(self) -> None:
        """Allocate the memory for all slots, and begin.

        Raises:
            UserError: there is not enough memory.
        """
        try:
            with inference(self.served.model.device, self.served.precision):
                end = self.served.tokenizer.end_token_id
                self._batch.add(Writing([end], 1, GREEDY, torch.Generator(), tell=lambda _: None))
                self._batch.step()
        except (MemoryError, RuntimeError) as error:
            raise UserError(
                f"{self.served.name} with {self.slots} slots of {self.served.context_length:,} tokens does not fit into the "
                f"memory of {self.served.model.device} ({(str(error).splitlines() or [type(error).__name__])[0]}); lower --slots."
            ) from None
        self._thread.start()

    def submit(self, writings: Sequence[Writing]) -> None:
        """Put texts into the queue: all of them or none.

        Raises:
            BusyError: too many wait.
            ClosedError: the server ends.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            self._waiting = deque(writing for writing in self._waiting if not writing.cancelled)
            free = self.slots - sum(not writing.finished for writing in self._written)
            if len(self._waiting) + len(writings) > self.queue + max(0, free):
                raise BusyError
            self._waiting += writings
            self._changed.notify()

    @property
    def is_closed(self) -> bool:
        """Whether it writes nothing any more."""
        return self._closed

    @property
    def busy(self) -> tuple[int, int]:
        """How many texts are written, and how many wait."""
        return len(self._batch.texts), len(self._waiting)

    def close(self) -> None:
        """Tell all clients, and write nothing more. A signal's handler may call this."""
        with self._changed:
            self._closed = True
            for writing in [*self._waiting, *self._written]:
                writing.tell(ClosedError())
            self._changed.notify()

    @property
    def _written(self) -> list[Writing]:
        return cast("list[Writing]", self._batch.texts)

    def _empty_batch(self) -> Batch:
        served = self.served
        return Batch(served.model, self.slots, served.context_length, fixed_shapes=self.fixed_shapes)

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
        finally:
            if not self._closed:  # nothing else may end the thread; if something does, nobody shall wait for it
                self.close()

    def _step(self) -> None:
        try:
            if self._batch.texts:  # they may all have left
                with inference(self.served.model.device, self.served.precision):
                    self._batch.step()
        except Exception as error:  # whatever it is, these texts cannot be written, and the server stays
            failed, self._batch = self._written, self._empty_batch()
            for writing in failed:
                writing.tell(error)
            tell(f"serve: {self.served.name}: {error}", error=True)

    def _admit(self) -> bool:
        """Wait for work, and let texts join and leave; False when the server ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._batch.texts)
            for writing in self._written:
                if writing.cancelled:
                    self._batch.remove(writing)
            while self._waiting and len(self._batch.texts) < self.slots:
                writing = self._waiting.popleft()
                if not writing.cancelled:
                    self._batch.add(writing)
            return not self._closed
