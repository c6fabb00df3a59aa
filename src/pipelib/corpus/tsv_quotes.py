"""Whether the quotes of a tsv file are csv's or text. Both kinds of file are common, and nothing in a file says which it is.

pandas and the csv module quote a text with a tab, a line end or a quote in it, and double the quotes inside. Databases, `cut`
and most published data sets quote nothing: there, a text may begin with a quote that nothing closes.
"""

import csv
import re
from pathlib import Path
from typing import Any

from pipelib.corpus.text_files import Decoding
from pipelib.errors import UserError

_QUOTED = re.compile(r'(?<![^\t])"((?:[^"\t]++|"")*+)"?(?![^\t\n])')
"""What is inside the quotes of a value that takes a whole column of a line, or is continued on the next."""


def has_quoting(path: Path, name: str, decoding: Decoding) -> bool:
    """Whether a tsv file quotes values as csv does; otherwise a quote is a character like any other.

    It does if all of it can be read so. If not, it still does if a value has doubled quotes inside of quotes, which nobody
    writes otherwise: then the file has an error, and its reader names the line.

    Raises:
        UserError: it can be read both ways, into different rows.
    """
    with decoding.open(path, name, newline="") as file:
        file.reconfigure(errors="replace")  # stray bytes count when the rows are read
        try:
            doubtful_line = _doubtful_line(csv.reader(file, delimiter="\t", strict=True))
        except csv.Error:
            doubtful_line = None
    if doubtful_line == 0:
        return True
    with decoding.open(path, name) as file:
        file.reconfigure(errors="replace")
        if any('""' in value for line in file if '""' in line for value in _QUOTED.findall(line)):
            return True
    if doubtful_line:
        raise UserError(
            f"{name}, line {doubtful_line}: it is unknown whether a quote here is text, or ends a text that began on a line "
            "before, because the number of values fits both; write the file as .jsonl, or as .csv, where quotes are never text."
        )
    return False


def _doubtful_line(rows: Any) -> int:
    """Return where the first value of several lines ends, if each line of all such values could be a row; otherwise 0.

    Args:
        rows: what `csv.reader` returns.

    Raises:
        csv.Error: the quotes do not fit: something follows a closing one, one is not closed, or values are missing where the
            line has enough tabs.
    """
    tabs = len(next(rows, [])) - 1
    line_of: dict[bool, int] = {}
    for values in rows:
        lines = "\t".join(values).split("\n")
        are_rows = all(line.count("\t") == tabs for line in lines)
        if are_rows and 0 < len(values) <= tabs:
            raise csv.Error
        if len(lines) > 1:
            line_of.setdefault(are_rows and tabs > 0, rows.line_num)
    return 0 if False in line_of else line_of.get(True, 0)
