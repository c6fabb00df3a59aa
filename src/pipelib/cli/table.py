"""Print tables: drawn for a person at a terminal, as aligned text for a program in a pipe."""

import sys
from collections.abc import Sequence


def print_table(rows: Sequence[Sequence[str]], *, header: bool = True) -> None:
    """Print the rows: as a table if the terminal is wide enough, else as `aligned` text.

    Args:
        rows: all of the same length.
        header: the first row names the columns.
    """
    if not (sys.stdout.isatty() and _print_on_terminal(rows, header)):
        print(aligned(rows))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as text, one per line; each column is as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _print_on_terminal(rows: Sequence[Sequence[str]], header: bool) -> bool:
    """Print a table whose cells wrap between words; False if a single word is too wide for it."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    cells = [[Text(cell) for cell in row] for row in rows]  # as Text, since rich reads [brackets] in a str as markup
    table = Table(box=box.SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in cells[0]:
        table.add_column(name, overflow="fold")
    for row in cells[1:] if header else cells:
        table.add_row(*row)
    needed = Measurement.get(console, console.options.update_width(sys.maxsize), table).minimum
    if needed > console.width:
        return False
    console.print(table)
    return True
