"""The one exception for what the user can mend: its message says the value, the consequence and the remedy."""

import errno
import os
import re
import sys
from pathlib import Path

_PROSE = r"(?:and|are|can|cannot|could|did|does|had|has|in|is|itself|knows|must|needs|not|of|or|was|were|will|would)\b"
_COMMANDS = re.compile(
    r"(?<=`)(?:pipelib|dvc|mlflow|hf|pip|python)(?= )"  # whatever stands in backticks
    rf"|(?<![\w./`-])(?:pipelib|dvc|mlflow|hf|pip)(?= (?!{_PROSE})[a-z][a-z-]*(?![\w-]*[./]\w))"  # "dvc repro", not "dvc a.txt"
    r"|(?<![\w./`-])python(?= -m )"
)


class UserError(ValueError):
    """A mistake or a circumstance that the user can mend.

    A stage or command that meets one prints its message without a traceback and exits with 1. Everything else that
    is raised is a defect of ours and keeps its traceback.
    """


def user_message(error: BaseException) -> str | None:
    """What to tell the user about an error that the user can mend; None for a defect of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.filename or 'while writing'}), so the stage stopped; free some space there or set "
            "PIPELIB_STATE_DIR to a folder on a larger disk (`pipelib clean` and `dvc gc -w` free what is old), and run dvc "
            "repro: it resumes from here, and outs that DVC removed come back."
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's; named, since not everybody who asks has torch
        return (
            f"the GPU's memory is too small ({str(error).splitlines()[0]}); lower train.micro_batch_size, or "
            "evaluate.batch_tokens in the evaluate stage. `pipelib plan` says what needs how much."
        )
    return None


def tell(text: str, *, error: bool = False) -> None:
    """Print a line at once, its commands as they must be typed.

    Args:
        error: to standard error, beside the result.
    """
    print(as_typed(text), file=sys.stderr if error else sys.stdout, flush=True)


def as_typed(message: str) -> str:
    """A message with its commands as they must be typed: `.venv/bin/dvc` where that environment is not activated."""
    own = Path(os.environ.get("DVC_ROOT", "."), ".venv").absolute()
    active = os.environ.get("VIRTUAL_ENV", "")
    if not (own / "bin/pipelib").exists() or (active and Path(active).resolve() == own.resolve()):
        return message
    return _COMMANDS.sub(r".venv/bin/\g<0>", message)


def how_to_repair(folder: str = "") -> str:
    """The remedy for a damaged out, where deleting it is none: DVC would link the same damaged bytes again.

    Args:
        folder: the out, as dvc.yaml names it, or nothing for all of them.
    """
    return f"run `{' '.join(filter(None, ('pipelib verify', folder, '--repair')))}`, then dvc repro"
