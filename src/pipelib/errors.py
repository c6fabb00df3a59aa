"""The one exception for problems that the user can fix. Its message gives the value, the consequence and the remedy."""

import errno
import os
import re
import sys
from pathlib import Path

# In "dvc did not answer" the word dvc is a name, not a command: these words never follow a command.
_PROSE = r"(?:and|are|can|cannot|could|did|does|had|has|in|is|itself|knows|must|needs|not|of|or|was|were|will|would)\b"
_COMMANDS = re.compile(
    r"(?<=`)(?:pipelib|dvc|mlflow|hf|pip|python)(?= )"  # anything in backticks
    rf"|(?<![\w./`-])(?:pipelib|dvc|mlflow|hf|pip)(?= (?!{_PROSE})[a-z][a-z-]*(?![\w-]*[./]\w))"  # "dvc repro", not "dvc a.txt"
    r"|(?<![\w./`-])python(?= -m )"
)


class UserError(ValueError):
    """A problem that the user can fix: a wrong value, a missing file, a full disk.

    A stage or command prints the message without a traceback and exits with status 1. Any other exception is a bug of
    ours and keeps its traceback.
    """


def user_message(error: BaseException) -> str | None:
    """Return the message for an error that the user can fix; None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.filename or 'while writing'}), so the stage stopped; free some space there or set "
            "PIPELIB_STATE_DIR to a folder on a larger disk (`pipelib clean` and `dvc gc -w` free old files), and run dvc "
            "repro: it resumes from here, and DVC restores the outs that it removed."
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, compared by name so that torch is not imported here
        return (
            f"the GPU's memory is too small ({str(error).splitlines()[0]}); lower train.micro_batch_size, or "
            "evaluate.batch_tokens in the evaluate stage. `pipelib plan` shows how much each part needs."
        )
    return None


def tell(text: str, *, error: bool = False) -> None:
    """Print a line immediately, with each command written as the user must type it.

    Args:
        error: print to standard error, so that the result on standard output stays clean.
    """
    print(with_venv_paths(text), file=sys.stderr if error else sys.stdout, flush=True)


def with_venv_paths(message: str) -> str:
    """Put `.venv/bin/` before the commands in a message, if the project's environment is not activated."""
    own = Path(os.environ.get("DVC_ROOT", "."), ".venv").absolute()
    active = os.environ.get("VIRTUAL_ENV", "")
    if not (own / "bin/pipelib").exists() or (active and Path(active).resolve() == own.resolve()):
        return message
    return _COMMANDS.sub(r".venv/bin/\g<0>", message)


def how_to_repair(folder: str = "") -> str:
    """Return the remedy for a damaged out. Deleting it does not help: DVC would link the same damaged bytes again.

    Args:
        folder: the out, as dvc.yaml names it; empty for all outs.
    """
    return f"run `{' '.join(filter(None, ('pipelib verify', folder, '--repair')))}`, then dvc repro"
