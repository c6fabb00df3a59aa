"""`pipelib compare`: what differs between runs, what it did, and how sure that is, in one table."""

from dataclasses import dataclass

from pipelib.cli.command import Command, option, positional
from pipelib.errors import tell

EXAMPLES = """examples:
  pipelib compare HEAD workspace             the last commit, and the workspace
  pipelib compare main small-rate            a branch, and an experiment of DVC
  pipelib compare . ../other-clone --md      two checkouts, as Markdown
"""


@dataclass(frozen=True)
class Compare(Command):
    """Compare runs."""

    command = "compare"
    help = "what differs between runs, and how sure that is"
    description = (
        "Print one table of runs: the parameters that differ, the metrics with their difference from the first and, where both "
        "were measured on the same items, its paired bootstrap 95 % interval; tokens, time, data, code. A RUN is `workspace`, "
        "the folder of a checkout, a git revision, or an experiment of DVC."
    )
    examples = EXAMPLES

    runs: tuple[str, ...] = positional("all are compared with the first; one alone with HEAD", nargs="+", metavar="RUN")
    md: bool = option("as a table in Markdown", default=False)

    def run(self) -> int:
        """Print the table, and below it what the numbers do not say.

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
