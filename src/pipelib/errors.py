"""The one exception for what the user can mend: its message says the value, the consequence and the remedy."""

import errno
import os
import re
from pathlib import Path

_COMMANDS = re.compile(
    r"(?<![\w./-])(?:pipelib (?:clean|compare|doctor|plan|publish|sample|summary|verify)|mlflow ui"
    r"|dvc (?:checkout|commit|exp|fetch|gc|pull|push|queue|repro))\b"
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
            "repro: it goes on from here, and outs that DVC removed come back."
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's; named, since not everybody who asks has torch
        return (
            f"the GPU's memory is too small ({str(error).splitlines()[0]}); lower train.micro_batch_size, or "
            "evaluate.batch_tokens in the evaluate stage. `pipelib plan` says what needs how much."
        )
    return None


def as_typed(message: str) -> str:
    """A message with its commands as they must be typed: `.venv/bin/dvc` where no environment is activated."""
    root = Path(os.environ.get("DVC_ROOT", "."))
    if "VIRTUAL_ENV" in os.environ or not (root / ".venv/bin/pipelib").exists():
        return message
    return _COMMANDS.sub(r".venv/bin/\g<0>", message)


def how_to_repair(folder: str = "") -> str:
    """The remedy for a damaged out, where deleting it is none: DVC would link the same damaged bytes again.

    Args:
        folder: the out, as dvc.yaml names it, or nothing for all of them.
    """
    return f"run `{' '.join(filter(None, ('pipelib verify', folder, '--repair')))}`, then dvc repro"
