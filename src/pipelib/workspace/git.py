"""Ask git about a checkout: its commit, and its uncommitted changes."""

import subprocess
from pathlib import Path

from pipelib.errors import UserError

WRITTEN_BY_STAGES = (":(exclude)dvc.lock", ":(exclude)metrics")
"""The files that git tracks and every run changes, as git's pathspecs."""


def git_state(root: Path) -> dict[str, str]:
    """Return the `commit` of a checkout (empty if there is none) and whether it is `dirty`.

    `dirty` is "true" if anything but the files that stages write differs from the commit, else "false". Both are empty if
    git cannot tell.
    """
    try:
        changes = run_git(root, "status", "--porcelain", "--", ".", *WRITTEN_BY_STAGES)
    except GitError:
        return {"commit": "", "dirty": ""}
    return {"commit": _git(root, "rev-parse", "HEAD").strip(), "dirty": str(bool(changes)).lower()}


def uncommitted_changes(root: Path, limit: int) -> str:
    """Return the diff between a checkout and its commit, cut at `limit` bytes, and the names of new files.

    Files that stages write are left out, and so is `.dvc`, which may hold the passwords of remotes.
    """
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", ".", *WRITTEN_BY_STAGES).splitlines()
    diff = _git(root, "diff", "HEAD", "--", ".", *WRITTEN_BY_STAGES, ":(exclude).dvc")
    if len(diff.encode()) > limit:  # `limit` is in bytes, and the cut may be inside a character
        diff = (
            f"{diff.encode()[:limit].decode(errors='ignore')}\n# cut here: {limit:,} bytes of {len(diff.encode()):,}\n"
        )
    return diff + "".join(f"# new, and not in this diff: {name}\n" for name in new)


def _git(root: Path, *arguments: str) -> str:
    """Run a git command and return what it prints; empty if it fails."""
    try:
        return run_git(root, *arguments).decode(errors="replace")
    except GitError:
        return ""


class GitError(UserError):
    """git is not installed, or a git command failed. The message has git's own words."""


def run_git(root: Path, *arguments: str) -> bytes:
    """Run a git command and return what it prints.

    Raises:
        GitError: it fails, for example because this is not a repository, or belongs to another user.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except OSError as error:
        why = (
            "git is not installed" if isinstance(error, FileNotFoundError) else f"git cannot be run ({error.strerror})"
        )
        raise GitError(f"{why}, so nothing is known about commits and experiments; install it, or fix PATH.") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split()) or f"status {done.returncode}, no message"
        raise GitError(
            f"git cannot read {root.absolute()} ({said}), so nothing is known about its commits and experiments; fix what git "
            "reports, and run the command again."
        )
    return done.stdout
