"""A row of a user's file as a document of the corpus; what is wrong with a row, and what is counted."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelib.corpus.raw import Document
from pipelib.errors import UserError, tell
from pipelib.files import is_unicode
from pipelib.schema import kind_of

END_OF_TEXT = "<|endoftext|>"
BAD_SHARE, BAD_ROWS = 0.01, 10
"""`bad_rows: skip` skips this share of all rows at most, but always this many: a tenth of the rows would be another corpus."""

Row = Mapping[str, Any]


class BadRowError(UserError):
    """A row that is not a document. Other rows of its file are not affected.

    Args:
        reason: a short name, for counting.
        message: the row, what is wrong, and the remedy.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(
            f"{message}; fix this row, skip it with download.bad_rows: skip, or leave out its file with download.pattern."
        )
        self.reason, self.problem = reason, message


@dataclass
class Tally:
    """Counts of what differs between the files and the documents made from them."""

    source: str = "local"
    """What printed lines begin with."""
    remedy: str = "fix the files, or download.text_column or download.encoding"
    """What to do if too many rows are bad."""
    rows: int = 0
    """Rows of all files."""
    empty: int = 0
    """Texts that are null or only white space."""
    replaced: int = 0
    """Stray bytes that became U+FFFD."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that were skipped, by reason."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Values that do not fit their optional column, by column."""
    separators: int = 0
    """How often `<|endoftext|>` occurs in texts."""
    with_separator: int = 0
    """How many texts contain it."""
    first: dict[str, str] = field(default_factory=dict)
    """By column, reason or `<|endoftext|>`: the file and row of the first occurrence."""

    def drop(self, column: str, where: str) -> None:
        """Count a value that its column cannot hold."""
        self.dropped[column] += 1
        self.first.setdefault(column, where)

    def skip(self, row: BadRowError) -> None:
        """Count a bad row that is left out."""
        self.bad[row.reason] += 1
        self.first.setdefault(row.reason, row.problem)

    def separate(self, count: int, where: str) -> None:
        """Count the occurrences of `<|endoftext|>` in a text."""
        self.separators += count
        self.with_separator += 1
        self.first.setdefault(END_OF_TEXT, where)

    def add(self, other: "Tally") -> None:
        """Add the counts of rows that come after these."""
        for name in ("rows", "empty", "replaced", "separators", "with_separator"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad.update(other.bad)
        self.dropped.update(other.dropped)
        self.first = {**other.first, **self.first}

    def require_few_bad(self) -> None:
        """Refuse a corpus of which too many rows are bad.

        Raises:
            UserError: with the reasons and the first row of each.
        """
        bad = self.bad.total()
        if bad > max(BAD_ROWS, BAD_SHARE * self.rows):
            lines = [f"  - {count:,} {reason}: {self.first[reason]}" for reason, count in self.bad.most_common()]
            raise UserError(
                f"{bad:,} of {self.rows:,} rows are bad, more than {BAD_SHARE:.0%}, so this may not be the corpus that you mean; "
                f"{self.remedy}:\n" + "\n".join(lines)
            )

    def counts(self) -> dict[str, Any]:
        """Return the counts for the metrics."""
        return {
            "empty_dropped": self.empty,
            "values_dropped": self.dropped.total(),
            "end_of_text_strings": self.separators,
            **({"bad_rows": dict(sorted(self.bad.items()))} if self.bad else {}),
        }

    def report(self, encoding: str) -> None:
        """Print what the user should know.

        Args:
            encoding: of the text files.
        """
        from pipelib.corpus.parquet import SCHEMA

        for reason, count in self.bad.most_common():
            tell(f"{self.source}: bad rows are left out ({reason}): {count:,}; the first is {self.first[reason]}")
        if self.replaced:
            tell(f"{self.source}: bytes that are not {encoding} were replaced by U+FFFD: {self.replaced:,}")
        for column, count in self.dropped.items():
            tell(
                f"{self.source}: values that do not fit the column `{column}` ({SCHEMA.field(column).type}) are null in the "
                f"corpus: {count:,}, the first in {self.first[column]}"
            )
        if self.separators:
            tell(
                f"{self.source}: texts contain {END_OF_TEXT} (occurrences: {self.separators:,}, documents: "
                f"{self.with_separator:,}, first in {self.first[END_OF_TEXT]}). It is treated as "
                "ordinary text and separates nothing: if it stands between the documents of a txt file, set "
                "download.split: separator"
            )


def document_of(row: Row, text_column: str, name: str, number: int, tally: Tally) -> Document | None:
    """Make a document from a row; None if its text is null or only white space.

    Args:
        name: the row's file.

    Raises:
        BadRowError: the text is missing or cannot be tokenized.
    """
    where = f"{name}, row {number}"
    if text_column not in row:
        raise BadRowError(
            "no text",
            f"{where}: there is no `{text_column}` (only {', '.join(row) or 'an empty object'}), the column in "
            "download.text_column, so the row is not a document",
        )
    text = _text(row[text_column], f"{where}: `{text_column}`")
    if not text or text.isspace():
        tally.empty += 1
        return None
    if END_OF_TEXT in text:
        tally.separate(text.count(END_OF_TEXT), where)
    # The file's name and the row are the defaults; the file's own columns replace them.
    values: dict[str, Any] = {"id": f"{name}:{number}", "file_path": name}
    for column, value in row.items():
        if column in _OPTIONAL and column != text_column and value is not None:
            usable = _OPTIONAL[column](value)
            if usable is None:
                tally.drop(column, where)
            else:
                values[column] = usable
    return Document(text, **values)


def _text(value: object, what: str) -> str:
    """Return a row's text; empty if it is null.

    Raises:
        BadRowError: the text cannot be tokenized.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        raise BadRowError(
            "stray bytes", f"{what} has bytes that are not text ({value!r:.60}), so it cannot be tokenized"
        )
    if not isinstance(value, str):
        raise BadRowError(
            f"text is {kind_of(value)}", f"{what} is {value!r:.60}, not a string, so it cannot be tokenized"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError("not Unicode", f"{what} is not Unicode ({error.reason}), so it has no UTF-8") from None
    return value


# ---- Optional columns ------------------------------------------------------------------------------------------------


def _as_text(value: object) -> object:
    return value if isinstance(value, str) and is_unicode(value) else None


def _as_float(value: object) -> object:
    """Convert an int to the nearest float, as JSON's decimal numbers are converted."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _as_int(value: object) -> object:
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return value if fits else None


def _as_count(value: object) -> object:
    """Like `_as_int`, but a negative number of tokens counts as unknown."""
    return _as_int(value) if not isinstance(value, int) or value >= 0 else None


_OPTIONAL: dict[str, Callable[[object], object]] = {
    "id": _as_text,
    "dump": _as_text,
    "url": _as_text,
    "file_path": _as_text,
    "language": _as_text,
    "language_score": _as_float,
    "token_count": _as_count,
    "score": _as_float,
    "int_score": _as_int,
}
"""The optional columns, each with the function that converts a value; it returns None if the value does not fit."""
