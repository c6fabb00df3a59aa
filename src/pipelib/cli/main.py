"""The `pipelib` command: all tools that are not stages of the pipeline.

Subcommands import what they need when they run, so that `pipelib --help` is fast.
"""

import io
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelib.cli.chat import Chat
from pipelib.cli.clean import Clean
from pipelib.cli.command import Command, Parser, positional
from pipelib.cli.compare import Compare
from pipelib.cli.doctor import Doctor
from pipelib.cli.evaluate import Evaluate
from pipelib.cli.export import Export
from pipelib.cli.export_tokens import ExportTokens
from pipelib.cli.plan import Plan
from pipelib.cli.plots_page import PlotsPage
from pipelib.cli.publish import Publish
from pipelib.cli.sample import Sample
from pipelib.cli.serve import Serve
from pipelib.cli.summary import Summary
from pipelib.cli.track import Track
from pipelib.cli.verify import Verify
from pipelib.errors import UserError, tell
from pipelib.processes import clear_rank_variables
from pipelib.workspace.places import HERE
from pipelib.workspace.provenance import versions

EXAMPLES = """examples:
  pipelib plan                        what a run with params.yaml would cost
  pipelib doctor                      is this machine ready?
  pipelib sample --prompt "Returns the"
  pipelib chat                        talk to the model
  pipelib serve                       the same in the browser, and OpenAI's endpoints
  pipelib COMMAND --help              help for one command

DVC runs the pipeline itself: dvc repro, dvc exp run -S train.max_lr=1.8e-3, dvc metrics diff.
"""
COMPLETION_EXAMPLES = """examples:
  source <(pipelib completion bash)            for this shell; in ~/.bashrc for every new one
  pipelib completion zsh > FOLDER/_pipelib     FOLDER must be in zsh's fpath
  pipelib completion tcsh > ~/.pipelib.tcsh    and `source ~/.pipelib.tcsh` in ~/.tcshrc
"""


@dataclass(frozen=True)
class Completion(Command):
    """Print a completion script. Defined here because it needs all commands."""

    command = "completion"
    help = "print the completion script for bash, zsh or tcsh"
    description = (
        "Print a script that makes your shell complete commands, options, their choices, files and folders when you press Tab. "
        "The script is for this version of pipelib; print it again after an update."
    )
    examples = COMPLETION_EXAMPLES

    shell: Literal["bash", "zsh", "tcsh"] = positional("your shell")

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
    Export,
    ExportTokens,
    Sample,
    Chat,
    Serve,
    Evaluate,
    Publish,
    Track,
    PlotsPage,
    Clean,
    Completion,
)


def make_parser() -> Parser:
    """Build the parser with all subcommands."""
    parser = Parser(
        "pipelib",
        description="Tools for the pipeline download, vocabulary, tokenize, train, finetune, evaluate. Run them in the root of "
        "the repository.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {versions('pipelib')['pipelib']}")
    parser.add_commands(COMMANDS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status.

    A mistake of the user gives one message and status 1. Ctrl-C gives 130, as in a shell. If the reader of the output has
    gone (`pipelib plan | head`), the command ends quietly with 141.

    Raises:
        SystemExit: after help and the version (0), and after wrong arguments (2).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write characters that the terminal cannot show
    clear_rank_variables()
    try:
        return _run(argv)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # else Python reports the broken pipe when it flushes at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(argv: list[str] | None) -> int:
    parser = make_parser()
    try:
        command = parser.parse_command(argv)
    except SystemExit:
        sys.stdout.flush()  # a broken pipe must show here, where `main` handles it, not at exit
        raise
    if command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status = command.run()
    except UserError as error:
        tell(f"pipelib: {error}", error=True)
        is_checkout = Path("dvc.yaml").exists() or HERE.params.exists()
        if not is_checkout and any(words in str(error) for words in ("dvc repro", "presets/")):
            tell(f"pipelib: {Path.cwd()} is not the root of a checkout, where most commands must be run.", error=True)
        return 1
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    sys.exit(main())
