"""Conversations as tokens: which are trained, which are held out, and the file from which all ranks read them."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError, tell
from pipelib.files import sha256_json, write_atomic
from pipelib.vocabulary.chat import ASSISTANT, ChatTemplate, Message, Turn

NAMED = 5
"""The most conversations that a message names."""


@dataclass(frozen=True)
class Dataset:
    """Conversations as arrays. Conversation i has the tokens from `starts[i]` to `starts[i + 1]`."""

    token_ids: npt.NDArray[np.int32]
    """(N,)."""
    trained: npt.NDArray[np.bool_]
    """Whether a token counts as a target (N,)."""
    starts: npt.NDArray[np.int64]
    """(conversations + 1,)."""
    answers: npt.NDArray[np.int64]
    """From where to where, in its conversation, the last answer is, with the token that ends it (conversations, 2)."""
    held_out: npt.NDArray[np.bool_]
    """Whether a conversation is for validation (conversations,)."""

    def __len__(self) -> int:
        return len(self.held_out)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each conversation."""
        return np.diff(self.starts)

    def tokens(self, number: int) -> npt.NDArray[np.int32]:
        """The tokens of one conversation."""
        return self.token_ids[self.starts[number] : self.starts[number + 1]]

    def mask(self, number: int) -> npt.NDArray[np.bool_]:
        """Which tokens of one conversation are trained."""
        return self.trained[self.starts[number] : self.starts[number + 1]]

    def numbers(self, *, held_out: bool) -> npt.NDArray[np.int64]:
        """The conversations of one split."""
        return np.flatnonzero(self.held_out == held_out)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of everything here."""
        return sha256_json([hashlib.sha256(array.tobytes()).hexdigest() for array in self._arrays().values()])

    def _arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def write(self, path: Path) -> None:
        """Write the file that `read` reads."""
        with write_atomic(path) as file:
            np.savez(file, **self._arrays())  # type: ignore[arg-type]

    @classmethod
    def read(cls, path: Path) -> "Dataset":
        """Read the file that `write` wrote."""
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


@dataclass
class Counts:
    """What became of the conversations."""

    kept: int = 0
    """Those that are trained on or held out."""
    held_out: int = 0
    turns: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    """Conversations that were too long, and end after an earlier answer."""
    too_long: int = 0
    """Conversations whose first answer does not fit; they are left out."""
    markers: int = 0
    """Contents with the spelling of a special token, which is ordinary text here."""
    named: dict[str, list[str]] = field(default_factory=dict)
    """Where the first of those were found."""

    def note(self, what: str, where: str) -> None:
        """Count one more, and remember where it is."""
        setattr(self, what, getattr(self, what) + 1)
        places = self.named.setdefault(what, [])
        if len(places) < NAMED:
            places.append(where)

    def report(self, longest: int) -> None:
        """Print what the user should know."""
        for what, text in (
            ("cut", f"conversations are longer than {longest:,} tokens and were cut after the last answer that fits"),
            (
                "too_long",
                f"conversations are left out, because their first answer does not fit into {longest:,} tokens",
            ),
            ("markers", "turns contain text that looks like a special token; it is encoded as ordinary text"),
        ):
            if count := getattr(self, what):
                more = ", ..." if count > NAMED else ""
                tell(f"finetune: {count:,} {text}: {', '.join(self.named[what])}{more}")


def encode(
    conversations: Iterable[tuple[str, Sequence[Message]]],
    template: ChatTemplate,
    *,
    longest: int,
    train_on: str,
    validation: float,
    most: int | None = None,
) -> tuple[Dataset, Counts]:
    """Encode conversations, and decide which are held out.

    Args:
        conversations: each with its file and row, or its name.
        longest: a conversation is cut after its last answer that ends within this many tokens and one more: the last token is
            only a target.
        train_on: `finetune.train_on`.
        validation: the share that is held out: those whose hash is below it. If there is none, the one with the lowest hash is.
        most: take only this many.

    Raises:
        UserError: no conversation is left, or one that is not held out.
    """
    counts, left_out = Counts(), 0
    pieces: list[npt.NDArray[np.int32]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    answers: list[tuple[int, int]] = []
    hashes: list[float] = []
    for where, messages in conversations:
        if len(pieces) == most:
            tell(f"finetune: the first {most:,} conversations are taken; finetune.max_conversations: null takes all")
            break
        fitting = _fitting(template.turns(messages), longest + 1)
        if not fitting:
            counts.note("too_long", where)
            left_out += 1
            continue
        if len(fitting) < len(messages):
            counts.note("cut", where)
        for message in messages[: len(fitting)]:
            if template.spells_marker(message.content):
                counts.note("markers", where)
        tokens, mask, answer = _masked(fitting, train_on)
        pieces.append(np.array(tokens, np.int32))
        masks.append(np.array(mask, np.bool_))
        answers.append(answer)
        hashes.append(_hash(messages[: len(fitting)]))
        counts.turns += len(fitting)
    if not pieces:
        why = (
            f"all {left_out:,} conversations are longer than {longest:,} tokens"
            if left_out
            else "there are no conversations"
        )
        remedy = "raise finetune.sequence_length, or add shorter ones" if left_out else "add conversations"
        raise UserError(f"finetune: {why}, so there is nothing to train on; {remedy}.")
    held_out = np.array(hashes) < validation
    if not held_out.any():
        held_out = np.array(hashes) == min(hashes)  # with its copies
    if held_out.all():
        raise UserError(
            f"finetune: all of the {len(pieces):,} conversations are held out for validation, so there is nothing to train on; "
            "add other conversations, or lower finetune.validation."
        )
    dataset = Dataset(
        np.concatenate(pieces),
        np.concatenate(masks),
        np.cumsum([0, *map(len, pieces)], dtype=np.int64),
        np.array(answers, np.int64),
        held_out,
    )
    counts.kept, counts.held_out = len(dataset), int(held_out.sum())
    counts.tokens, counts.trained_tokens = len(dataset.token_ids), int(dataset.trained.sum())
    return dataset, counts


def _fitting(turns: Sequence[Turn], most: int) -> Sequence[Turn]:
    """The turns up to the last answer that ends within `most` tokens. What follows its end token need not fit."""
    total, fitting = 0, 0
    for number, turn in enumerate(turns, start=1):
        if turn.role == ASSISTANT and total + turn.content.stop <= most:
            fitting = number
        total += len(turn.token_ids)
    return turns[:fitting]


def _masked(turns: Sequence[Turn], train_on: str) -> tuple[list[int], list[bool], tuple[int, int]]:
    """The tokens of a conversation, which are trained, and where the last answer is. It ends with the last answer's end token."""
    tokens: list[int] = []
    mask: list[bool] = []
    for number, turn in enumerate(turns, start=1):
        counts = turn.role == ASSISTANT and (train_on == "assistant" or number == len(turns))
        inside = range(turn.content.start, turn.content.stop)
        mask += [train_on == "all" or (counts and place in inside) for place in range(len(turn.token_ids))]
        tokens += turn.token_ids
    last, content = len(tokens) - len(turns[-1].token_ids), turns[-1].content
    start, stop = last + content.start, last + content.stop
    return tokens[:stop], mask[:stop], (start, stop)


def _hash(messages: Sequence[Message]) -> float:
    """A number from 0 to 1 that depends on the words alone: a conversation stays in its split when others come."""
    words = sha256_json([[message.role, message.content.strip()] for message in messages])
    return int(words[:13], 16) / 16**13
