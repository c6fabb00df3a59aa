"""Which code made a result: the import closure of a stage, and a hash that ignores comments and docstrings.

The dependencies of a stage in `dvc.yaml` are the files that this module finds for it (a test compares the two). So an edit
re-runs the stages whose results it can change, and no others. DVC compares bytes, but everything else compares
`code_hash`: after an edited comment DVC starts the stage, and the stage finds its finished outs and links them.
"""

import ast
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from pipelib.files import write_text
from pipelib.workspace.places import HERE
from pipelib.workspace.stages import STAGES

EXEMPT = {
    "stages/__init__.py": "only decides which checkout is imported",
    "src/pipelib/params.py": "accepts or refuses the whole of params.yaml; each package's own params.py is a dependency",
    "src/pipelib/progress.py": "prints; cannot change an out",
    "src/pipelib/corpus/experiment_copy.py": "accepts or refuses; cannot change an out",
    "src/pipelib/tracking/__init__.py": "a docstring",
    "src/pipelib/tracking/run.py": "records and mirrors; cannot change an out",
    "src/pipelib/workspace/git.py": "names the commit; cannot change an out",
    "src/pipelib/workspace/places.py": "says where things are, not what they are; tests compare it with dvc.yaml",
    "src/pipelib/workspace/provenance.py": "names the code; cannot change an out",
    "src/pipelib/workspace/stages.py": "lists the stages; a test compares it with dvc.yaml",
}
"""Files that no stage depends on, with the reason. The closure ends at them: files that only they import are exempt too."""
REMEMBERED = Path(__file__).parent / "__pycache__/code_hashes.json"
"""What was found in sources: it follows from them, as what Python keeps there does."""
NAMED = 10
"""The most changed files that a message names."""


def import_closure(root: Path, *starts: Path) -> list[Path]:
    """Return every file of this project that the files `starts` import, directly or not, with `starts` and without `EXEMPT`.

    Imports are read from the source with `ast`, including those inside functions. Nothing is imported.

    Args:
        root: the checkout, with `stages/` and `src/` in it.
        starts: Python files, relative to `root`.

    Returns:
        Paths relative to `root`, sorted.
    """
    found: set[Path] = set()
    waiting = [*starts]
    while waiting:
        path = waiting.pop()
        if path in found or path.as_posix() in EXEMPT:
            continue
        found.add(path)
        # Importing a module also runs the __init__.py of every package above it.
        waiting += [package for folder in path.parents if (root / (package := folder / "__init__.py")).is_file()]
        for module in _parsed(_read(root / path)).imports:
            waiting += _files_of(module, root)
    return sorted(found)


def code_hash(source: str) -> str:
    """Hash what a program does: the SHA-256 of its syntax tree.

    Comments, layout, docstrings and other bare strings do not count. The hash is the same for Python 3.11 to 3.13, whose
    trees differ only in empty fields.
    """
    return _parsed(source).sha256


@dataclass(frozen=True)
class _Parsed:
    imports: frozenset[str]
    """The dotted names in import statements; `from a import b` gives both a and a.b."""
    sha256: str


@cache  # the closures of the stages overlap
def _parsed(source: str) -> _Parsed:
    memory, key = _memory(), _sha256(source)
    if key not in memory.parsed:
        memory.parsed[key], memory.has_grown = _parse(source), True
    return memory.parsed[key]


def _parse(source: str) -> _Parsed:
    imports: set[str] = set()
    text: list[str] = []
    _write(ast.parse(source), text, imports)
    return _Parsed(frozenset(imports), _sha256("".join(text)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class _Memory:
    """What earlier processes have found in sources: to parse all of them takes the better part of a second."""

    parsed: dict[str, _Parsed]
    """By the SHA-256 of the source."""
    has_grown: bool = False

    def save(self) -> None:
        """Write the file, if there is something new and it can be written."""
        if self.has_grown:
            with suppress(OSError):
                found = {key: [sorted(one.imports), one.sha256] for key, one in self.parsed.items()}
                write_text(REMEMBERED, json.dumps({"by": _sha256(_read(Path(__file__))), "parsed": found}))
                self.has_grown = False


@cache
def _memory() -> _Memory:
    with suppress(OSError, ValueError, KeyError, TypeError):  # it is missing or damaged: everything is parsed again
        found = json.loads(REMEMBERED.read_bytes())
        if found["by"] == _sha256(_read(Path(__file__))):
            return _Memory({key: _Parsed(frozenset(names), sha256) for key, (names, sha256) in found["parsed"].items()})
    return _Memory({})


def _write(node: object, text: list[str], imports: set[str]) -> None:
    """Append a syntax tree as text to `text`, without the parts that have no effect, and add its imports to `imports`."""
    if isinstance(node, ast.Import):
        imports |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        imports |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, ast.AST):
        text.append(f"{type(node).__name__}(")
        for name in node._fields:
            part = getattr(node, name, None)
            if isinstance(part, list):
                part = [item for item in part if not _has_no_effect(item, node)]
            if part is not None and part != []:  # skip empty fields, since newer versions of Python have more of them
                text.append(f"{name}=")
                _write(part, text, imports)
        text.append(")")
    elif isinstance(node, list):
        text.append("[")
        for item in node:
            _write(item, text, imports)
            text.append(",")
        text.append("]")
    else:
        text.append(repr(node))


def _has_no_effect(node: object, parent: ast.AST) -> bool:
    """Return whether a part of a tree has no effect: a bare string, or the empty piece that Python 3.12.1 adds to f-strings."""
    if isinstance(parent, ast.JoinedStr):
        return isinstance(node, ast.Constant) and node.value == ""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache  # the closures of the stages overlap
def _files_of(module: str, root: Path) -> list[Path]:
    """Return the file of a module or package; empty if it is not this project's."""
    base = {"pipelib": Path("src"), "stages": Path()}.get(module.split(".")[0])
    if base is None:
        return []
    path = base.joinpath(*module.split("."))
    return [file for file in (path / "__init__.py", path.with_suffix(".py")) if (root / file).is_file()]


def chosen_files(stage: str, params: Mapping[str, object]) -> list[Path]:
    """Return the files that the parameters choose for a stage.

    Args:
        params: with flat keys, such as `download.source`.
    """
    fill_in = partial(re.sub, r"\$\{([\w.]+)\}", lambda key: str(params[key[1]]))
    return [Path(fill_in(template)) for template in STAGES[stage].chosen]


def code_hashes(stage: str, params: Mapping[str, object], root: Path = Path()) -> dict[str, str]:
    """Identify the code of a stage: the hash of every file in its import closure, by path, and the versions of its packages.

    Args:
        params: with flat keys; some of them choose code.
    """
    closure = import_closure(root, HERE.stage(stage), *chosen_files(stage, params))
    files = {path.as_posix(): code_hash(_read(root / path)) for path in closure}
    _memory().save()
    return files | {f"package {name}": version for name, version in versions(*STAGES[stage].packages).items()}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """List what differs between two `code_hashes`, for a message."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of installed packages, without local suffixes such as +cpu."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
