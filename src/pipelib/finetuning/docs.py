"""Questions and answers made from the docstrings of the offline corpus, without a network.

    What does numpy.clip do?          The first sentence of the docstring.
    What are its parameters?          Their names, from the section Parameters or Args.
    What does it return?              The first line of the section Returns.

The same docstrings give the same conversations. Documents of the validation split give none.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelib.files import sha256_file
from pipelib.vocabulary.chat import ASSISTANT, USER, Message
from pipelib.workspace.places import MANIFEST

LONGEST = 240
"""The most characters of an answer; longer sentences are left out."""


@dataclass(frozen=True)
class DocsConversations:
    """One conversation for each docstring that begins with a sentence, in the order of the corpus."""

    raw: Path
    """The folder of the corpus."""
    skip: int
    """Documents at the start of the corpus that are the validation split."""
    bad_rows: Counter[str] = field(default_factory=Counter, compare=False)
    """None."""

    def identity(self) -> dict[str, Any]:
        """Return what decides the conversations."""
        return {"kind": "docs", "raw": sha256_file(self.raw / MANIFEST), "skip": self.skip}

    def finish(self) -> None:
        """Nothing is left out."""

    def read(self) -> Iterator[tuple[str, list[Message]]]:
        """Yield each conversation with the name of what it is about. Of those with the same name, the first one stays."""
        from pipelib.corpus.parquet import iterate_raw  # not needed to link finished outs

        seen: set[str] = set()
        for number, row in enumerate(iterate_raw(self.raw, ("text", "id"))):
            name = public_name(row["id"] or "")
            if number < self.skip or not name or name in seen:
                continue
            if messages := conversation_about(name, row["text"]):
                seen.add(name)
                yield str(row["id"]), messages


def public_name(identity: str) -> str:
    """Return how people import a function or class: numpy.clip for numpy._core.fromnumeric.clip; empty for a private one.

    Modules from the first private one on are left out, classes are not.
    """
    *path, name = identity.split(".")
    if not path or name.startswith("_"):
        return ""
    private = next((place for place, part in enumerate(path) if part.startswith("_")), len(path))
    classes = [part for part in path[private:] if part[:1].isupper()]
    return ".".join([*path[:private], *classes, name])


def conversation_about(name: str, docstring: str) -> list[Message]:
    """Return the questions that a docstring answers, and its answers; empty if it does not begin with a sentence."""
    does = summary(docstring)
    if not does:
        return []
    turns = [(f"What does {name} do?", does)]
    if names := parameters(docstring):
        turns.append(("What are its parameters?", names))
    if returned := returns(docstring):
        turns.append(("What does it return?", returned))
    return [message for question, answer in turns for message in (Message(USER, question), Message(ASSISTANT, answer))]


def summary(docstring: str) -> str:
    """Return the first sentence of a docstring; empty if it is not one, or too long."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.match(r"(.+?(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?])(?:\s|$)", paragraph)
    text = sentence[1] if sentence else ""
    is_sentence = re.match(r"[A-Z`\"]", text) and not re.search(r"::|[=\-~]{4}|>>>", text)
    return text if is_sentence and len(text) <= LONGEST else ""


def parameters(docstring: str) -> str:
    """Return the names in the section of parameters: `The parameters are a, b and c.`; empty if there are none."""
    numpy_style = _section(docstring, r"Parameters\n-{4,}\n", r"^([*\w][*\w, ]*?)(?: *:.*)?$")
    google_style = _section(docstring, r"(?:Args|Arguments):\n", r"^ {2,4}(\*{0,2}\w+)(?: *\(.*?\))? *:(?: .*)?$")
    names = [name.strip() for line in numpy_style or google_style for name in line.split(",") if name.strip()]
    if not names or any(" " in name for name in names):
        return ""
    *first, last = names
    text = f"The parameters are {', '.join(first)} and {last}." if first else f"The only parameter is {last}."
    return text if len(text) <= LONGEST else ""


def returns(docstring: str) -> str:
    """Return the first line of the section of what is returned; empty if there is none."""
    lines = _section(docstring, r"Returns\n-{4,}\n", r"^([^\s*].*)$") or _section(
        docstring, r"Returns:\n", r"^ {2,}(\S.*)$"
    )
    text = lines[0].strip() if lines else ""
    return text if 0 < len(text) <= LONGEST else ""


def _section(docstring: str, heading: str, entry: str) -> list[str]:
    """Return what the entries of a section match, up to the next heading."""
    start = re.search(rf"^{heading}", docstring, re.MULTILINE)
    if not start:
        return []
    found = []
    lines = docstring[start.end() :].split("\n")
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if re.fullmatch(r"[-=~]{3,}", following.strip()) or re.fullmatch(r"\w+:", line):
            break
        if match := re.match(entry, line):
            found.append(match[1])
    return found
