"""The formats in which datasets hold conversations. Each is recognised by its columns, or named in `finetune.format`.

- messages: `messages`, a list of {role, content}: OpenAI's and TRL's
- sharegpt: `conversations`, a list of {from, value}, with an optional column `system`
- alpaca: `instruction`, `input` (optional) and `output`, with an optional column `system`
- prompt: `prompt` and `completion` or `response`, each a text or a list of {role, content}
"""

from collections.abc import Callable, Mapping
from typing import Any

from pipelib.corpus.local_rows import BadRowError, Row
from pipelib.files import is_unicode
from pipelib.schema import kind_of
from pipelib.vocabulary.chat import ASSISTANT, SYSTEM, USER, Message, order_problem

ROLE_NAMES = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT, "bot": ASSISTANT,
}  # fmt: skip
"""The role that each name in a file stands for."""


def conversation_of(row: Row, chosen: str, where: str) -> list[Message]:
    """Read the conversation in a row.

    Args:
        chosen: `finetune.format`.
        where: the file and the row, for messages.

    Raises:
        BadRowError: the row does not hold a conversation that a model can learn from.
    """
    name = _recognised(row, where) if chosen == "auto" else chosen
    try:
        messages = FORMATS[name](row)
    except KeyError as error:
        raise BadRowError(
            "unknown columns",
            f"{where}: the column {error.args[0]} is missing (it has {', '.join(row) or 'nothing'}), and the format {name} "
            "needs it",
        ) from None
    except _WrongValueError as error:
        raise BadRowError("turns", f"{where}: {error}") from None
    if problem := order_problem(messages):
        raise BadRowError("roles", f"{where}: {problem}")
    return messages


def _recognised(row: Row, where: str) -> str:
    found = [name for name, (first, *_) in COLUMNS.items() if first in row]
    if len(found) != 1:
        known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in COLUMNS.items())
        what = "columns of several formats" if found else "no column of a conversation"
        raise BadRowError(
            "unknown columns",
            f"{where}: there is {what} (it has {', '.join(row) or 'none'}), so it is unknown who says what; known are {known} "
            "(finetune.format chooses one)",
        )
    return found[0]


class _WrongValueError(ValueError):
    """A turn, or a content, that cannot be used."""


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _text(value: object, what: str) -> str:
    """A content as text. OpenAI's form in parts is joined."""
    if isinstance(value, list) and value and all(_is_text_part(part) for part in value):
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise _WrongValueError(f"{what} is {kind_of(value)}, not a text")
    if not is_unicode(value):
        raise _WrongValueError(f"{what} has characters that cannot be written as UTF-8")
    return value


def _message(entry: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(entry, Mapping):
        raise _WrongValueError(f"a turn is {kind_of(entry)}, not an object with {role_key} and {content_key}")
    for key in (role_key, content_key):
        if key not in entry:
            raise _WrongValueError(f"a turn has no {key} (only {', '.join(map(str, entry)) or 'nothing'})")
    role = ROLE_NAMES.get(str(entry[role_key]))
    if role is None:
        raise _WrongValueError(f"the role {entry[role_key]!r} is not one of {', '.join(ROLE_NAMES)}")
    if entry.get("tool_calls"):
        raise _WrongValueError("a turn calls tools, which the chat template does not have")
    return Message(role, _text(entry[content_key], f"the content of a turn of the role {role}"))


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _WrongValueError(f"{name} is {kind_of(value)}, not a list of turns")
    return value


def _system(row: Row) -> list[Message]:
    system = row.get("system")
    return [Message(SYSTEM, _text(system, "system"))] if system else []


def _messages(row: Row) -> list[Message]:
    return _system(row) + [_message(entry, "role", "content") for entry in _list(row["messages"], "messages")]


def _sharegpt(row: Row) -> list[Message]:
    turns = _list(row["conversations"], "conversations")
    own = not (turns and isinstance(turns[0], Mapping) and "role" in turns[0])
    keys = ("from", "value") if own else ("role", "content")
    return _system(row) + [_message(entry, *keys) for entry in turns]


def _alpaca(row: Row) -> list[Message]:
    question, more = _text(row["instruction"], "instruction"), row.get("input")
    if more:
        question = f"{question.strip()}\n\n{_text(more, 'input').strip()}"
    return [*_system(row), Message(USER, question), Message(ASSISTANT, _text(row["output"], "output"))]


def _prompt(row: Row) -> list[Message]:
    answer = "completion" if "completion" in row or "response" not in row else "response"
    return _system(row) + _side(row["prompt"], USER, "prompt") + _side(row[answer], ASSISTANT, answer)


def _side(value: object, role: str, name: str) -> list[Message]:
    if isinstance(value, list) and all(isinstance(entry, dict) and "role" in entry for entry in value):
        return [_message(entry, "role", "content") for entry in value]
    return [Message(role, _text(value, name))]


FORMATS: dict[str, Callable[[Row], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt": _prompt,
}
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
}
"""The columns of each format; the first one shows which it is."""
