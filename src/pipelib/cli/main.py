"""The `pipelib` command: what is not a stage of the pipeline.

Subcommands import what they need when they run, so that `pipelib --help` is there at once.
"""

import io
import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

from pipelib.cli.clean import Clean
from pipelib.cli.command import Command, Parser, positional
from pipelib.cli.compare import Compare
from pipelib.cli.doctor import Doctor
from pipelib.cli.evaluate import Evaluate
from pipelib.cli.export_tokens import ExportTokens
from pipelib.cli.plan import Plan
from pipelib.cli.plots_page import PlotsPage
from pipelib.cli.publish import Publish
from pipelib.cli.sample import Sample
from pipelib.cli.summary import Summary
from pipelib.cli.track import Track
from pipelib.cli.verify import Verify
from pipelib.errors import UserError, tell
from pipelib.processes import clear_rank_variables
from pipelib.workspace.provenance import versions

EXAMPLES = """examples:
  pipelib plan                        what params.yaml would cost, before it costs it
  pipelib doctor                      is this machine ready?
  pipelib sample --prompt "Returns the"
  pipelib COMMAND --help              more about one of them

The pipeline itself is DVC's: dvc repro, dvc exp run -S train.max_lr=1.8e-3, dvc metrics diff.
"""
COMPLETION_EXAMPLES = """examples:
  source <(pipelib completion bash)            for this shell; in ~/.bashrc, for each new one
  pipelib completion zsh > FOLDER/_pipelib     with a folder of zsh's fpath
  pipelib completion tcsh > ~/.pipelib.tcsh    and `source ~/.pipelib.tcsh` in ~/.tcshrc
"""


@dataclass(frozen=True)
class Completion(Command):
    """Complete what is typed in a shell; it stands here since it needs all commands."""

    command = "completion"
    help = "print what makes bash, zsh or tcsh complete pipelib"
    description = (
        "Print a script for a shell, which then completes commands, options, their choices, files and folders when Tab is "
        "pressed. The script is of this version of pipelib; make it again after an update."
    )
    examples = COMPLETION_EXAMPLES

    shell: Literal["bash", "zsh", "tcsh"] = positional("the shell that is to complete")

    def run(self) -> int:
        """Print the script."""
        import shtab

        print(shtab.complete(make_parser(), self.shell))
        return 0


COMMANDS: tuple[type[Command], ...] = (
    Plan,
    Summary,
    Compare,
    Doctor,
    Verify,
    ExportTokens,
    Sample,
    Evaluate,
    Publish,
    Track,
    PlotsPage,
    Clean,
    Completion,
)


def make_parser() -> Parser:
    """The command line, all subcommands included."""
    parser = Parser(
        "pipelib",
        description="Companion of the pipeline download -> tokenize -> train -> evaluate. Run it in the repository's root.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {versions('pipelib')['pipelib']}")
    parser.add_commands(COMMANDS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status.

    The user's mistakes become one message and status 1. Ctrl-C gives 130, as in a shell; a reader that went away
    (`pipelib plan | head`) ends the command quietly with 141.

    Raises:
        SystemExit: after help and the version (0), and after wrong arguments (2).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes characters that not every terminal has
    clear_rank_variables()
    try:
        return _run(argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(argv: list[str] | None) -> int:
    parser = make_parser()
    try:
        command = parser.parse_command(argv)
    except SystemExit:
        sys.stdout.flush()  # the help; at exit, Python would complain of a reader that went away
        raise
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = command.run()
    except UserError as error:
        tell(f"pipelib: {error}", error=True)
        return 1
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
