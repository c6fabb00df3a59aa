"""Rows of cells as a person reads them in a terminal, and as programs read them in a pipe."""

import sys
from collections.abc import Sequence


def print_table(rows: Sequence[Sequence[str]], *, header: bool = True) -> None:
    """Print the rows: as a table on a terminal that is wide enough for one, else as `aligned` text.

    Args:
        rows: all of the same length.
        header: the first row names the columns.
    """
    if not (sys.stdout.isatty() and _print_on_terminal(rows, header)):
        print(aligned(rows))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows, one a line, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _print_on_terminal(rows: Sequence[Sequence[str]], header: bool) -> bool:
    """Print the table with wrapped cells; False where a word would have to be cut to fit the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False)
    for name in rows[0]:
        table.add_column(Text(name) if header else "", overflow="fold")
    for row in rows[header:]:
        table.add_row(*map(Text, row))  # Text, or rich would take [brackets] for markup
    if console.measure(table).minimum > console.width:
        return False
    console.print(table)
    return True
