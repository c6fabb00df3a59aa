"""Large files are read by several processes: the documents are those of one process, whatever is cut where."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelib.corpus import bundles as module
from pipelib.corpus.bundles import FileSlice, bundles_of
from pipelib.corpus.local_formats import Reading, read_rows
from pipelib.corpus.local_rows import BadRowError
from pipelib.corpus.options import Options
from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.raw import Written, write_manifest
from pipelib.corpus.sources.local import LocalSource
from pipelib.corpus.split import Cut
from pipelib.corpus.text_files import Decoding
from pipelib.errors import UserError
from pipelib.files import sha256_file

ROW = st.sampled_from(
    ['{"text": "a"}', '{"text": "é\\r\\n"}', '{"text": "\u2028"}', "not JSON", "", " ", f'{{"text": "{"x" * 99}"}}']
)


def bundles(folder: Path, names: list[str], bundle_bytes: int, encoding: str = "utf-8") -> list[list[FileSlice]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUNDLE_BYTES", bundle_bytes)
        patch.setattr(module, "_BLOCK", 7)
        return list(bundles_of(folder, names, reading(encoding), lambda task, calls: (task(*call) for call in calls)))


def reading(encoding: str = "utf-8") -> Reading:
    return Reading("text", Decoding(encoding, "refuse"), Cut("whole", ""))


def rows(folder: Path, bundle: list[FileSlice], encoding: str = "utf-8") -> Iterator[tuple[str, int, str]]:
    for part in bundle:
        for number, row in read_rows(folder / part.name, part.name, reading(encoding), part.slice):
            yield part.name, number, str(row) if isinstance(row, BadRowError) else json.dumps(dict(row))


@given(
    st.lists(st.tuples(ROW, st.sampled_from(["\n", "\r\n", "\r"])), max_size=20),
    st.integers(1, 300),
    st.sampled_from(["", "\ufeff"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_parts_of_lines_have_the_rows_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str]], bundle_bytes: int, mark: str, ended: bool
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    text = mark + "".join(row + end for row, end in lines)
    (folder / "a.jsonl").write_bytes((text if ended else text.rstrip("\r\n")).encode())
    (folder / "b.jsonl").write_bytes(b'{"text": "next"}')
    names = ["a.jsonl", "b.jsonl"]
    found = bundles(folder, names, bundle_bytes)
    assert [row for bundle in found for row in rows(folder, bundle)] == list(
        rows(folder, bundles(folder, names, 10**6)[0])
    )
    assert len(found) >= len(text.encode()) // (bundle_bytes + 200)


def test_parts_of_parquet_have_the_rows_of_the_file(tmp_path: Path) -> None:
    texts = [None if number % 7 == 0 else f"text {number} " * 5 for number in range(1000)]
    table = pa.table({"text": texts, "id": [str(number) for number in range(1000)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=90)
    for bundle_bytes, count in ((1, 12), (10_000, 4), (10**6, 1)):
        found = bundles(tmp_path, ["a.parquet"], bundle_bytes)
        assert len(found) == count
        assert [row for bundle in found for row in rows(tmp_path, bundle)] == [
            ("a.parquet", number + 1, json.dumps({"text": text, "id": str(number)}))
            for number, text in enumerate(texts)
        ]


@pytest.mark.parametrize(
    ("name", "encoding"), [("a.jsonl", "utf-16"), ("a.txt", "utf-8"), ("a.csv", "utf-8"), ("a.jsonl.gz", "utf-8")]
)
def test_a_file_whose_rows_cannot_be_found_is_one_part(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(b"x\n" * 500)
    assert [part.slice for bundle in bundles(tmp_path, [name], 100, encoding) for part in bundle] == [module.WHOLE]


def test_small_files_share_a_bundle(tmp_path: Path) -> None:
    names = [f"{number}.txt" for number in range(10)]
    for name in names:
        (tmp_path / name).write_bytes(b"x" * 40)
    assert [len(bundle) for bundle in bundles(tmp_path, names, 100)] == [3, 3, 3, 1]


# ---- With processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    for name in ("a", "b"):
        (path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {number}"}}\n' for number in range(300)))
    (path / "c.txt").write_text("third\n" * 200)
    (path / "held.jsonl").write_text('{"text": "held out"}\n')
    return path


def imported(folder: Path, out: Path, options: Options, bundle_bytes: int) -> Written:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUNDLE_BYTES", bundle_bytes)
        written = LocalSource(folder, "**/*", None, options).write(out, out / "work")
    write_manifest(out, {}, written)
    return written


def test_any_number_of_processes_writes_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(validation="held*", bad_rows="skip", stray_bytes="replace")
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"text": "stray \xff"}\n[1]\n{"text": "<|endoftext|>"}\n')
    whole = imported(folder, tmp_path / "whole", options, 10**6)
    for workers in ("1", "3"):
        monkeypatch.setenv("PIPELIB_WORKERS", workers)
        written = imported(folder, tmp_path / workers, options, 1500)
        assert len(written.files) == 7
        assert sorted(path.name for path in (tmp_path / workers).iterdir()) == [
            *(f"{number:03d}_00000.parquet" for number in range(7)), "manifest.json"
        ]  # fmt: skip
        assert (written.counts, written.validation_documents) == (whole.counts, 1)
        assert list(iterate_raw(tmp_path / workers, ("text", "id", "file_path"))) == list(
            iterate_raw(tmp_path / "whole", ("text", "id", "file_path"))
        )
    assert whole.counts["bad_rows"] == {"row is a list": 1}
    assert (whole.counts["stray_bytes_replaced"], whole.counts["end_of_text_strings"]) == (1, 1)
    for path in (tmp_path / "1").iterdir():
        assert sha256_file(path) == sha256_file(tmp_path / "3" / path.name)


def test_the_first_problem_is_named_whoever_finds_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELIB_WORKERS", "2")
    lines = (folder / "b.jsonl").read_text().splitlines()
    lines[250], lines[280] = '{"text": 5}', "not JSON"
    (folder / "b.jsonl").write_text("\n".join(lines))
    (folder / "c.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"^b.jsonl, row 251: `text` is 5, not a string") as caught:
        imported(folder, tmp_path / "out", Options(), 2000)
    assert "fix this row, skip it with download.bad_rows: skip" in str(caught.value)


def test_too_many_bad_rows_in_all_bundles_together_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text('{"text": "x"}\n' * 300 + "[]\n" * 6)
    with pytest.raises(UserError, match=r"12 of .* rows are bad, .*\n  - 12 row is a list: a.jsonl, row 301"):
        imported(folder, tmp_path / "out", Options(bad_rows="skip"), 3000)
