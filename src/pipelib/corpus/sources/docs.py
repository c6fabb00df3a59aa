"""The offline corpus: the docstrings of the installed scientific packages, about 20 MB of technical English.

The packages are not imported. Their files are found by Python's import system, read, and parsed with `ast`. Each docstring
of at least 400 characters is a document. The versions of the packages (`constraints.txt`) pin the text.

Expect 14,600 documents, 21.8 MB, and 13 s of CPU time (AMD EPYC), shared by the workers.
"""

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelib.corpus.params import DownloadParams
from pipelib.corpus.raw import Document, Source, Written, first_documents
from pipelib.errors import UserError
from pipelib.files import is_unicode
from pipelib.pool import Pool
from pipelib.processes import worker_count
from pipelib.progress import Progress

PACKAGES = {
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "numpy": "numpy",
    "pandas": "pandas",
    "networkx": "networkx",
    "sympy": "sympy",
    "torch": "torch",
}
"""Distributions and their top-level packages. The order matters: of two equal texts, the first one stays."""

MIN_CHARACTERS = 400
"""Minimum length of a document: shorter docstrings are mostly one line and a signature."""

_QUOTES = re.compile(rb"\"\"\"|'''")
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_FILES_PER_TASK = 16
_File = tuple[Path, str, str]
"""See `read_documents`."""


def package_versions() -> dict[str, str]:
    """Return the version of every package of the corpus, without local suffixes such as +cpu.

    Raises:
        UserError: a package is not installed.
    """
    try:
        return {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, so the offline corpus would be different; run "
            "`pip install -c constraints.txt -e .`, or set download.source to local or hub."
        ) from None


def source(params: DownloadParams) -> Source:
    """Return this source, with its parameters."""
    return DocsSource(params.seed, params.max_tokens)


@dataclass(frozen=True)
class DocsSource:
    """The offline corpus, in an order that `seed` decides.

    The text depends only on the packages' versions and the seed: not on Python's version, the number of processes
    (`PIPELIB_WORKERS`, default one per core) or the machine.
    """

    seed: int
    max_tokens: int | None = None

    def identity(self) -> dict[str, Any]:
        """Return the versions of the packages, the seed, and `max_tokens` if it is set."""
        identity = {"kind": "docs", "packages": package_versions(), "seed": self.seed}
        return identity if self.max_tokens is None else {**identity, "max_tokens": self.max_tokens}

    def write(self, folder: Path, work: Path) -> Written:  # noqa: ARG002  (quick enough to start again)
        """Read all packages and write their docstrings. Of equal texts, only the first in the order of paths stays.

        Raises:
            UserError: a package is not installed.
        """
        from pipelib.corpus.parquet import write_raw

        found = [document for documents in _read_all(_source_files()) for document in documents]
        unique = {
            document.text: document for document in reversed(found)
        }  # reversed, so that the first of equal texts stays
        ordered = sorted(unique.values(), key=lambda document: _shuffle_key(self.seed, document))
        counts: dict[str, int] = {}
        written = write_raw(first_documents(ordered, self.max_tokens, counts), folder)
        return replace(written, counts={**written.counts, "duplicates_dropped": len(found) - len(unique), **counts})


def _shuffle_key(seed: int, document: Document) -> tuple[bytes, str]:
    """Return the sort key for the seeded order. The text breaks ties between equal ids, such as a getter's and a setter's."""
    return hashlib.sha256(f"{seed} {document.id}".encode()).digest(), document.text


def _source_files() -> list[_File]:
    """Return every Python file to read: its path, its path inside site-packages, and the package's name and version.

    Tests are left out: they take more than a third of the time and hold 1.4 % of the text. numpy.distutils is left out too:
    NumPy has it only for Python 3.11, and the text must be the same for every version.
    """
    files: list[_File] = []
    for name, version in package_versions().items():
        spec = importlib.util.find_spec(PACKAGES[name])
        assert spec is not None, f"{name} is installed, but not as {PACKAGES[name]}"
        assert spec.submodule_search_locations, f"{PACKAGES[name]} is not a package"
        root = Path(next(iter(spec.submodule_search_locations)))
        relative = sorted(path.relative_to(root.parent) for path in root.rglob("*.py"))
        files += [
            (root.parent / path, path.as_posix(), f"{name} {version}") for path in relative if not _left_out(path)
        ]
    return files


def _left_out(path: Path) -> bool:
    return "tests" in path.parts or path.name.startswith("test_") or path.is_relative_to("numpy/distutils")


def _read_all(files: Sequence[_File]) -> Iterator[list[Document]]:
    """Yield the documents of each file, in the order of the files. Several processes read them."""
    tasks = [(files[start : start + _FILES_PER_TASK],) for start in range(0, len(files), _FILES_PER_TASK)]
    progress = Progress("docs: reading docstrings", len(files), "files")
    with Pool(worker_count(max_useful=len(tasks)), _start_worker) as pool:
        for documents in pool.in_order(_read_some, tasks):
            progress.add(len(documents))
            yield from documents
    progress.close()


def _read_some(files: Sequence[_File]) -> list[list[Document]]:
    return [read_documents(*file) for file in files]


def _start_worker() -> None:
    gc.disable()  # syntax trees have no cycles, and the search for cycles would take a sixth of the time


def read_documents(path: Path, name: str, dump: str) -> list[Document]:
    """Return the docstrings of one Python file that are long enough, in the order of the file.

    Args:
        name: the file's path inside site-packages; ids are made from it.
        dump: the package and its version.
    """
    source = path.read_bytes()
    if not _may_hold_documents(source):
        return []
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in other people's code
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.11's category for the same
        tree = ast.parse(source)
    texts = ((identity, clean(text)) for identity, text in _docstrings(tree, module))
    return [
        Document(text, identity, dump=dump, file_path=name, language="en")
        for identity, text in texts
        if len(text) >= MIN_CHARACTERS and is_unicode(text)
    ]


def _may_hold_documents(source: bytes) -> bool:
    """Return whether two triple quotes are far enough apart. This check saves parsing one file in three."""
    places = [match.start() for match in _QUOTES.finditer(source)]
    return any(end - start >= MIN_CHARACTERS for start, end in pairwise(places))


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the raw docstring of a node and of all definitions in it.

    Only statements are visited: an expression cannot contain a definition, and expressions are most of a tree.
    """
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield name, text
    for block in _BLOCKS:
        for child in _statements(getattr(node, block, ())):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _docstrings(child, f"{name}.{child.name}")
            else:
                yield from _docstrings(child, name)


def _statements(block: object) -> Iterable[ast.AST]:
    """Return the nodes of a block. The `body` of a lambda or a conditional expression is not a list and has no definitions."""
    return block if isinstance(block, list) else ()


def clean(docstring: str) -> str:
    """Remove a docstring's indentation, trailing spaces, and empty lines at both ends.

    `inspect.cleandoc` would do the same, but Python 3.13's version treats some white space differently.
    """
    first, *rest = docstring.expandtabs().split("\n")
    margin = min((len(line) - len(line.lstrip(" ")) for line in rest if line.strip(" ")), default=sys.maxsize)
    lines = [first.lstrip(" "), *(line[margin:] for line in rest)]
    return "\n".join(line.rstrip(" ") for line in lines).strip("\n")
