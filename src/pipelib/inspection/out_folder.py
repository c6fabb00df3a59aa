"""The output folder of a command."""

from pathlib import Path

from pipelib.errors import UserError


def make_out(out: Path, *, empty: bool) -> None:
    """Create the folder of `--out`, before any work is done.

    Args:
        empty: refuse a folder that is not empty.

    Raises:
        UserError: the folder cannot be created or read, or is not empty.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_used = empty and any(out.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--out {out} cannot be used ({reason}), so nothing was written; name another folder."
        ) from None
    if is_used:
        raise UserError(
            f"--out {out} is not empty, so its files could be mixed with the new ones; name another folder."
        )
