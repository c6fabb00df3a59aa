"""`pipelib compare`: what differs between runs, its effect, and the confidence interval, in one table."""

from dataclasses import dataclass

from pipelib.cli.command import Command, option, positional
from pipelib.errors import tell

EXAMPLES = """examples:
  pipelib compare HEAD workspace             the last commit, and the workspace
  pipelib compare main small-rate            a branch, and a DVC experiment
  pipelib compare . ../other-clone --md      two checkouts, as Markdown
"""


@dataclass(frozen=True)
class Compare(Command):
    """Compare runs."""

    command = "compare"
    help = "compare runs: parameters, metrics and confidence intervals"
    description = (
        "Print one table of runs: the parameters that differ; the metrics, with the difference from the first run and, if both "
        "were measured on the same items, its 95 % interval (paired bootstrap); tokens, time, data and code. A RUN is "
        "`workspace` (this checkout), the folder of another checkout, a git revision, or a DVC experiment."
    )
    examples = EXAMPLES

    runs: tuple[str, ...] = positional(
        "the others are compared with the first one; a single RUN is compared with HEAD", nargs="+", metavar="RUN"
    )
    md: bool = option("print a Markdown table", default=False)

    def run(self) -> int:
        """Print the table, and notes on the numbers below it.

        Raises:
            UserError: a run was not found.
        """
        from pipelib.cli.table import print_table
        from pipelib.evaluation.document import Table, to_markdown
        from pipelib.inspection.comparison import notes_on, rows_of
        from pipelib.inspection.runs import find_run

        runs = [find_run(name) for name in (self.runs if len(self.runs) > 1 else ("HEAD", *self.runs))]
        header, rows = ["", *(run.name for run in runs)], rows_of(runs)
        if self.md:
            print(to_markdown([Table(header, rows)]).rstrip())
        else:
            print_table([header, *rows])
        print()
        for note in notes_on(runs):
            tell(f"- {note}" if self.md else note)
        return 0
