"""The `pipelib` command: what is not a stage of the pipeline.

Subcommands import what they need when they run, so that `pipelib --help` is there at once.
"""

import argparse
import io
import os
import signal
import sys

from pipelib.cli import (
    clean,
    compare,
    doctor,
    evaluate,
    export_tokens,
    plan,
    plots_page,
    publish,
    sample,
    summary,
    track,
    verify,
)
from pipelib.errors import UserError, as_typed
from pipelib.processes import leave_other_jobs
from pipelib.workspace.provenance import versions

EXAMPLES = """examples:
  pipelib plan                        what params.yaml would cost, before it costs it
  pipelib doctor                      is this machine ready?
  pipelib sample --prompt "Returns the"
  pipelib COMMAND --help              more about one of them

The pipeline itself is DVC's: dvc repro, dvc exp run -S train.max_lr=1.8e-3, dvc metrics diff.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line, all subcommands included."""
    parser = argparse.ArgumentParser(
        "pipelib",
        description="Companion of the pipeline download -> tokenize -> train -> evaluate. Run it in the repository's root.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {versions('pipelib')['pipelib']}")
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands")
    for module in (
        plan,
        summary,
        compare,
        doctor,
        verify,
        export_tokens,
        sample,
        evaluate,
        publish,
        track,
        plots_page,
        clean,
    ):
        module.add_parser(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand and return its exit status.

    The user's mistakes become one message and status 1. Ctrl-C gives 130, as in a shell; a reader that went away
    (`pipelib plan | head`) ends the command quietly.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model writes characters that not every terminal has
    leave_other_jobs()
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if "run" not in arguments:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"pipelib: {as_typed(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


if __name__ == "__main__":
    sys.exit(main())
