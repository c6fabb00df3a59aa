"""The offline corpus: what counts as a document, and that nothing but versions and the seed decides it."""

import inspect
from pathlib import Path

import pytest

from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.raw import write_manifest
from pipelib.corpus.sources import docs
from pipelib.corpus.sources.docs import DocsSource, clean, package_versions, read_documents
from pipelib.errors import UserError

LONG = "\n    ".join(f"Line {number} says something about the matter." for number in range(12))
SOURCE = f'''"""Module.

    {LONG}
"""
X = """{LONG} not a docstring"""


class Outer:
    r"""Outer with \\d.

    {LONG}
    """

    if X:

        async def method(self):
            """Method.

            {LONG}
            """

            def inner():
                """Inner.

                {LONG}
                """

    def short(self):
        """Short."""


try:
    pass
except ValueError:

    def handler():
        """Bad escape \\d and half a surrogate pair \\ud800. {LONG}"""
else:

    def otherwise():
        """Bad escape \\d.

        {LONG}
        """
'''


def write_source(folder: Path) -> Path:
    path = folder / "module.py"
    path.write_text(SOURCE)
    return path


def test_every_long_docstring_is_a_document(tmp_path: Path) -> None:
    documents = read_documents(write_source(tmp_path), "package/sub/module.py", "package 1.0")
    assert [document.id for document in documents] == [
        "package.sub.module",
        "package.sub.module.Outer",
        "package.sub.module.Outer.method",
        "package.sub.module.Outer.method.inner",
        "package.sub.module.otherwise",
    ]
    assert documents[1].text.startswith("Outer with \\d.\n\nLine 0 says something about the matter.\nLine 1")
    assert {document.dump for document in documents} == {"package 1.0"}


def test_an_init_file_is_its_package(tmp_path: Path) -> None:
    assert read_documents(write_source(tmp_path), "package/sub/__init__.py", "")[0].id == "package.sub"


@pytest.mark.parametrize(
    "text", ["", "one", "\n\n  a\n    b\n  \n", "first\n    second\n\n      third\n    ", "a\n\tb"]
)
def test_clean_does_what_inspect_does_and_drops_trailing_spaces(text: str) -> None:
    expected = "\n".join(line.rstrip() for line in inspect.cleandoc(text).split("\n")).strip("\n")
    assert clean(text) == expected


def test_workers_do_not_matter_and_the_seed_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "PACKAGES", {"networkx": "networkx"})
    made = {}
    for workers, seed in (("1", 1), ("2", 1), ("1", 2)):
        monkeypatch.setenv("PIPELIB_WORKERS", workers)
        folder = tmp_path / f"{workers}-{seed}"
        written = DocsSource(seed).write(folder, tmp_path)
        write_manifest(folder, {}, written)
        made[workers, seed] = (written, [row["text"] for row in iterate_raw(folder)])
    assert made["1", 1] == made["2", 1]
    assert made["1", 1][1] != made["1", 2][1]
    assert sorted(made["1", 1][1]) == sorted(made["1", 2][1])
    texts = made["1", 1][1]
    assert len(set(texts)) == len(texts) > 800
    assert min(map(len, texts)) >= 400


def test_what_only_some_pythons_have_is_left_out() -> None:
    names = [name for _, name, _ in docs._source_files()]
    assert "numpy/__init__.py" in names
    assert not [name for name in names if name.startswith("numpy/distutils/")]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "PACKAGES", {"no-such-package": "no_such_package"})
    with pytest.raises(UserError, match=r"no-such-package is not installed.*constraints\.txt"):
        package_versions()
