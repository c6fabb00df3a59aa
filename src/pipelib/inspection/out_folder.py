"""The folder that a command writes into."""

from pathlib import Path

from pipelib.errors import UserError


def make_out(out: Path, *, empty: bool) -> None:
    """Make the folder of `--out` before any work is done for it.

    Args:
        empty: refuse one that has something in it.

    Raises:
        UserError: the folder cannot be made or read, or is not empty.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        is_used = empty and any(out.iterdir())
    except (OSError, ValueError) as error:  # the latter for a NUL in its name
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"--out {out} cannot be used ({reason}), so nothing was written; name another folder."
        ) from None
    if is_used:
        raise UserError(f"--out {out} is not empty, so its files could be mixed up with these; name another folder.")
