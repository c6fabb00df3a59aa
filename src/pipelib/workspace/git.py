"""What git knows of a checkout: its commit, and what is in no commit."""

import subprocess
from pathlib import Path

from pipelib.errors import UserError

WRITTEN_BY_STAGES = (":(exclude)dvc.lock", ":(exclude)metrics")
"""What every run changes and git tracks, as git's pathspecs."""


def git_state(root: Path) -> dict[str, str]:
    """`commit` of a checkout, empty where there is none, and `dirty`: "true" where anything but what stages write differs
    from it, else "false"; empty where git cannot say."""
    try:
        changes = run_git(root, "status", "--porcelain", "--", ".", *WRITTEN_BY_STAGES)
    except GitError:
        return {"commit": "", "dirty": ""}
    return {"commit": _git(root, "rev-parse", "HEAD").strip(), "dirty": str(bool(changes)).lower()}


def uncommitted_changes(root: Path, limit: int) -> str:
    """The diff of a checkout to its commit, and the names of new files; cut at `limit` bytes.

    Without what stages write, and without `.dvc`, where remotes and their passwords are set up.
    """
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", ".", *WRITTEN_BY_STAGES).splitlines()
    diff = _git(root, "diff", "HEAD", "--", ".", *WRITTEN_BY_STAGES, ":(exclude).dvc")
    if len(diff.encode()) > limit:
        diff = (
            f"{diff.encode()[:limit].decode(errors='ignore')}\n# cut here: {limit:,} bytes of {len(diff.encode()):,}\n"
        )
    return diff + "".join(f"# new, and not in this diff: {name}\n" for name in new)


def _git(root: Path, *arguments: str) -> str:
    """What a git command prints; nothing where it fails."""
    try:
        return run_git(root, *arguments).decode(errors="replace")
    except GitError:
        return ""


class GitError(UserError):
    """git is not installed, or it refused; the message has git's own words."""


def run_git(root: Path, *arguments: str) -> bytes:
    """What a git command prints.

    Raises:
        GitError: it fails, for example since this is not a repository or belongs to another user.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False)
    except OSError as error:
        why = (
            "git is not installed" if isinstance(error, FileNotFoundError) else f"git cannot be run ({error.strerror})"
        )
        raise GitError(f"{why}, so nothing is known of commits and experiments; install it, or correct PATH.") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split()) or f"status {done.returncode}, without a word"
        raise GitError(
            f"git cannot read {root.absolute()} ({said}), so nothing is known of its commits and experiments; correct what git "
            "names, and run the command again."
        )
    return done.stdout
