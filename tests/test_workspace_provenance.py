"""The hash of code forgives words and nothing else, and is the same for every Python that the pipeline runs on."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_params import PARAMS
from small_project import CHECKOUT

from pipelib.schema import flatten
from pipelib.workspace import provenance
from pipelib.workspace.provenance import NAMED, changed, code_hash, code_hashes

PROGRAM = '''
"""A module."""

LIMIT = 3
"""How many."""


class Shelf:
    """Holds books."""

    books: list[str]
    """Their titles."""

    def add(self, title: str = "", end: None = None, **more: str) -> str:
        """Add a book."""
        # a comment
        if len(self.books) < LIMIT:
            self.books.append(title)
        return f"{title!r:>{LIMIT}} of {len(more):,}"
'''


def test_words_and_layout_are_forgiven() -> None:
    tree = ast.parse(PROGRAM)
    assert code_hash(ast.unparse(tree)) == code_hash(PROGRAM)
    assert code_hash(PROGRAM.replace("A module", "Another")) == code_hash(PROGRAM)
    assert code_hash(PROGRAM.replace('"""How many."""', "")) == code_hash(PROGRAM)
    assert code_hash(PROGRAM.replace("# a comment", "# other\n")) == code_hash(PROGRAM)
    assert code_hash("# new\n" + PROGRAM.replace("LIMIT = 3", "LIMIT = (\n    3\n)")) == code_hash(PROGRAM)
    assert code_hash('"""Only words."""') == code_hash("")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("LIMIT = 3", "LIMIT = None"),
        ("<", "<="),
        ("end: None = None", "end: int = None"),
        ("end: None = None", "last: None = None"),
        ("**more", "*more"),
        (":,}", "}"),
        ("!r:>", ":>"),
        ('title: str = ""', 'title: str = " "'),
        ('title: str = ""', "title: str"),
        ("of {", "{"),
        ("self.books.append(title)", "pass"),
        ("self.books.append(title)", "return ''"),
        ("list[str]", "list[int]"),
        ("class Shelf:", "class Shelf(dict):"),
        ("    def add", "    @property\n    def add"),
        ("    def add", "    async def add"),
    ],
)
def test_what_a_program_does_is_not_forgiven(old: str, new: str) -> None:
    assert old in PROGRAM
    assert code_hash(PROGRAM.replace(old, new)) != code_hash(PROGRAM)


def test_an_empty_string_counts_where_it_is_a_value() -> None:
    values = [
        "['']",
        "[]",
        "[None]",
        "[[]]",
        "['', '']",
        "f''",
        "''",
        "f'{x}'",
        "f'{x:}'",
        "f'{x}' ''",
        "f'{x} '",
        "b''",
    ]
    hashes = {value: code_hash(f"y = {value}") for value in values}
    same = [("f'{x}'", "f'{x}' ''")]  # the same text, written in two pieces
    assert all(hashes[one] == hashes[other] for one, other in same)
    assert len(set(hashes.values())) >= len(values) - 2  # f'{x:}' may or may not be f'{x}': the two do the same


SOURCES = sorted(
    path.relative_to(CHECKOUT) for part in ("src", "stages", "tests") for path in (CHECKOUT / part).rglob("*.py")
)
SAMPLES = Path(__file__).with_name("code_hashes.json")
"""Hashes of programs with all kinds of syntax, made with Python 3.11; a change of the rule changes them."""
HASH_ALL = """
import json, sys
from pathlib import Path
from pipelib.workspace.provenance import code_hash
print(json.dumps({path: code_hash(Path(path).read_text(encoding="utf-8")) for path in sys.stdin.read().split()}))
"""


def test_the_hashes_of_samples_are_those_that_were_kept() -> None:
    samples = json.loads(SAMPLES.read_text(encoding="utf-8"))
    assert len(samples) > 20
    assert {source: code_hash(source) for source in samples} == samples


@pytest.mark.parametrize("python", ["python3.12", "python3.13"])
def test_every_python_has_the_same_hashes(python: str) -> None:
    installed = [
        shutil.which(python),
        *Path.home().glob(f".pyenv/versions/{python.removeprefix('python')}.*/bin/python"),
    ]
    works = [name for name in installed if name and not subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL)]
    if not works:
        pytest.skip(f"{python} is not installed")
    found = subprocess.run(
        [works[0], "-c", HASH_ALL], input="\n".join(map(str, SOURCES)), cwd=CHECKOUT, capture_output=True, text=True,
        check=True, env={"PYTHONPATH": str(CHECKOUT / "src"), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert json.loads(found.stdout) == {
        str(path): code_hash((CHECKOUT / path).read_text(encoding="utf-8")) for path in SOURCES
    }


def test_a_stage_is_named_by_its_files_and_packages() -> None:
    hashes = code_hashes("tokenize", {}, CHECKOUT)
    assert "stages/tokenize.py" in hashes
    assert "src/pipelib/tokens/shards.py" in hashes
    assert hashes["package gigatoken"][0].isdigit()
    assert "src/pipelib/workspace/places.py" not in hashes


def test_a_message_names_some_of_many_changed_files() -> None:
    many = {f"{number:02}.py": "a" for number in range(NAMED + 5)}
    assert changed(many, many) == ""
    assert changed({"a.py": "1"}, {"a.py": "2", "b.py": "1"}) == "a.py, b.py"
    assert changed(many, {}).endswith("09.py and 5 more")


if __name__ == "__main__":  # python tests/test_workspace_provenance.py: after the rule changed
    kept = json.loads(SAMPLES.read_text(encoding="utf-8"))
    SAMPLES.write_text(json.dumps({source: code_hash(source) for source in kept}, indent=2) + "\n", encoding="utf-8")
    sys.exit()


# ---- What is remembered ----------------------------------------------------------------------------------------------


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a process that has parsed nothing remembers what it finds."""
    monkeypatch.setattr(provenance, "REMEMBERED", tmp_path / "code_hashes.json")
    forget()
    yield tmp_path / "code_hashes.json"
    forget()


def forget() -> None:
    provenance._memory.cache_clear()
    provenance._parsed.cache_clear()


def hashes_of_train() -> dict[str, str]:
    forget()
    return code_hashes("train", dict(flatten(PARAMS)), CHECKOUT)


@pytest.mark.usefixtures("remembered")
def test_sources_are_parsed_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    first = hashes_of_train()
    parsed: list[str] = []
    parse = provenance._parse
    monkeypatch.setattr(provenance, "_parse", lambda source: parsed.append(source) or parse(source))
    assert hashes_of_train() == first
    assert parsed == []
    forget()
    code_hash("y = 1")
    assert parsed == ["y = 1"]
    monkeypatch.setattr(provenance, "__file__", __file__)  # this program itself has changed
    assert hashes_of_train() == first
    assert len(parsed) > 50


@pytest.mark.parametrize("content", [b"", b"{}", b'{"by": 3, "parsed": []}', b"\xff", None])
def test_a_memory_that_cannot_be_read_or_written_is_left_aside(remembered: Path, content: bytes | None) -> None:
    first = hashes_of_train()
    if content is None:
        remembered.unlink()
        remembered.mkdir()
    else:
        remembered.write_bytes(content)
    assert hashes_of_train() == first
