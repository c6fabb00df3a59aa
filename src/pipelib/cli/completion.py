"""`pipelib completion`: what makes a shell complete the commands and options of pipelib."""

from dataclasses import dataclass
from typing import Literal

from pipelib.cli.command import Command, positional

EXAMPLES = """examples:
  source <(pipelib completion bash)            for this shell; in ~/.bashrc, for each new one
  pipelib completion zsh > FOLDER/_pipelib     with a folder of zsh's fpath
  pipelib completion tcsh > ~/.pipelib.tcsh    and `source ~/.pipelib.tcsh` in ~/.tcshrc
"""


@dataclass(frozen=True)
class Completion(Command):
    """Complete what is typed in a shell."""

    command = "completion"
    help = "print what makes bash, zsh or tcsh complete pipelib"
    description = (
        "Print a script for a shell, which then completes commands, options, their choices, files and folders when Tab is "
        "pressed. The script is of this version of pipelib; make it again after an update."
    )
    examples = EXAMPLES

    shell: Literal["bash", "zsh", "tcsh"] = positional("the shell that is to complete")

    def run(self) -> int:
        """Print the script."""
        import shtab

        from pipelib.cli.main import make_parser

        print(shtab.complete(make_parser(), self.shell))
        return 0
