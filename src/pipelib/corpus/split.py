"""Cut a txt file into documents."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

WHOLE_CHARACTERS = 100_000
"""`whole`: a file is cut at the next empty line after this many characters."""
AUTO_DOCUMENTS, AUTO_CHARACTERS = 500, 2_000
"""`auto`: about this many documents of all txt files, but none shorter than this. A Chinese character counts as the three bytes
that it has in UTF-8, so that a document has about as many tokens in every script."""
_BLOCK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Cut:
    """Where documents end."""

    method: str
    """`download.split`."""
    separator: str
    """`download.separator`."""
    characters: int = WHOLE_CHARACTERS
    """`whole` and `auto`: a document ends at the first empty line after this many."""

    @classmethod
    def of(cls, method: str, separator: str, total_bytes: int) -> "Cut":
        """Choose the length of documents.

        Args:
            total_bytes: of all txt files, for `auto`.
        """
        short = min(WHOLE_CHARACTERS, max(AUTO_CHARACTERS, total_bytes // AUTO_DOCUMENTS))
        return cls(method, separator, short if method == "auto" else WHOLE_CHARACTERS)

    @property
    def limit(self) -> int:
        """Characters after which a document ends at any line, so that a file without empty lines fits in memory."""
        return (40 if self.characters == WHOLE_CHARACTERS else 2) * self.characters

    def for_script_of(self, text: str) -> "Cut":
        """Return the cut with `auto`'s characters as bytes of a text like this one: a third of them for Chinese."""
        if self.method != "auto" or self.characters == WHOLE_CHARACTERS or not text:
            return self
        return replace(self, characters=self.characters // round(len(text.encode("utf-8", "replace")) / len(text)))


def cut_text(file: io.TextIOBase, cut: Cut) -> Iterator[str]:
    """Yield the documents of a file in order."""
    match cut.method:
        case "line":
            yield from (line.rstrip("\n") for line in file if not line.isspace())
        case "empty_line":
            yield from _paragraphs(file)
        case "separator":
            yield from _separated(file, cut.separator)
        case _:
            yield from _lengths(file, cut)


def _paragraphs(file: io.TextIOBase) -> Iterator[str]:
    lines: list[str] = []
    for line in file:
        if not line.isspace():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


def _separated(file: io.TextIOBase, separator: str) -> Iterator[str]:
    """Yield what is between the separators, without white space at its ends."""
    document: list[str] = []  # the pieces of the document so far
    tail = ""  # may be the start of a separator
    while block := file.read(_BLOCK_CHARACTERS):
        *ends, rest = (tail + block).split(separator)
        for end in ends:
            if text := "".join([*document, end]).strip():
                yield text
            document = []
        cut = max(0, len(rest) - len(separator) + 1)
        document.append(rest[:cut])
        tail = rest[cut:]
    if text := "".join([*document, tail]).strip():
        yield text


def _lengths(file: io.TextIOBase, cut: Cut) -> Iterator[str]:
    """Yield pieces of about equal lengths, cut at empty lines where there are any. A file without text is one empty piece."""
    block = file.read(_BLOCK_CHARACTERS)
    cut = cut.for_script_of(block)
    text, is_first = "", True
    while block:
        text += block
        start = 0
        while end := _end(text, start, cut):
            yield text[start:end]
            start, is_first = end, False
        text = text[start:]
        block = file.read(_BLOCK_CHARACTERS)
    if text or is_first:
        yield text


def _end(text: str, start: int, cut: Cut) -> int:
    """Return where the document that begins at `start` ends; 0 if more of the file is needed to tell."""
    end = text.find("\n", start + cut.characters - 1) + 1
    while end:
        line = text.rfind("\n", start, end - 1) + 1
        if end - start >= cut.limit or text[line:end].isspace():
            break
        end = text.find("\n", end) + 1
    longest = start + 2 * cut.limit
    if cut.method == "auto" and (end > longest or (not end and len(text) > longest)):  # a long line
        places = (text.rfind(end, start + cut.characters, longest) + 1 for end in (" ", "。"))
        return next(filter(None, places), longest)
    return end
