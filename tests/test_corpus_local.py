"""The user's files: every kind is read, and every kind of damage is named."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelib.corpus.local import TXT_CHARACTERS, LocalSource
from pipelib.corpus.raw import Written, iterate_raw, write_manifest
from pipelib.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    return path


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_zstd(path: Path, *frames: bytes) -> None:
    with path.open("wb") as file:
        for frame in frames:
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(frame)
            file.write(sink.getvalue())


def read(folder: Path, pattern: str = "**/*") -> tuple[Written, list[dict[str, object]]]:
    out = folder.parent / "out"
    written = LocalSource(folder, pattern).write(out / "raw", out / "work")
    write_manifest(out / "raw", {}, written.files)
    return written, list(iterate_raw(out / "raw", ("text", "id", "file_path", "score", "token_count")))


def test_every_kind_in_the_order_of_paths(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "a1", "id": "own"}, {"text": "a2", "other": [1]}))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines({"text": "b1"})) + gzip.compress(lines({"text": "b2"})))
    write_zstd(folder / "c.jsonl.zst", lines({"text": "c1"}), lines({"text": "c2\u2028still"}))
    pq.write_table(pa.table({"text": ["d1"], "score": [4.5], "id": [7], "junk": [b"x"]}), folder / "d.parquet")
    (folder / "sub/e.txt").write_bytes("e1 é\r\n\r\nmore\r\n".encode())
    for ignored in ("README.md", ".hidden.txt", "sub/data.csv"):
        (folder / ignored).write_text("not text to train on")
    written, rows = read(folder)
    assert [row["text"] for row in rows] == ["a1", "a2", "b1", "b2", "c1", "c2\u2028still", "d1", "e1 é\n\nmore\n"]
    assert [row["id"] for row in rows][:3] == ["own", "a.jsonl:2", "b.jsonl.gz:1"]
    assert rows[6] == {"text": "d1", "id": "d.parquet:1", "file_path": "d.parquet", "score": 4.5, "token_count": None}
    assert rows[7]["file_path"] == "sub/e.txt"
    assert written.counts["empty_dropped"] == 0


def test_names_with_glob_characters(folder: Path) -> None:
    (folder / "we[i]rd*.txt").write_text("text")
    assert [row["text"] for row in read(folder)[1]] == ["text"]


def test_long_txt_files_are_cut_at_empty_lines(folder: Path) -> None:
    paragraph = "word " * 999 + "end\n\n"
    (folder / "book.txt").write_text(paragraph * 50)
    rows = read(folder)[1]
    assert "".join(str(row["text"]) for row in rows) == paragraph * 50
    assert [row["id"] for row in rows] == ["book.txt:1", "book.txt:2", "book.txt:3"]
    assert all(str(row["text"]).endswith("end\n\n") for row in rows)
    assert len(str(rows[0]["text"])) < TXT_CHARACTERS + len(paragraph)


def test_empty_texts_are_left_out_and_counted(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines({"text": ""}, {"text": " \n"}, {"text": "x"}) + b"\n\n")
    (folder / "b.txt").write_text("\n")
    written, rows = read(folder)
    assert [row["text"] for row in rows] == ["x"]
    assert written.counts["empty_dropped"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines({"text": "x"}) + b"{half", r"a\.jsonl, row 2: not JSON"),
        ("a.jsonl", lines({"text": "x"}, ["y"]), r"a\.jsonl, row 2: \['y'\] is not an object"),
        ("a.jsonl", lines({"text": "x"}, {"body": "y"}), r"a\.jsonl, row 2: no `text` \(it has body\)"),
        ("a.jsonl", lines({"text": None}), r"a\.jsonl, row 1: `text` is null"),
        ("a.jsonl", lines({"text": 5}), r"a\.jsonl, row 1: `text` is 5, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, row 1: `text` is not Unicode"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl cannot be read past row 0 .*utf-8"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read past row 0 .*[Gg]zip"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(*({"text": str(n)} for n in range(9999))))[:-99],
            r"a\.jsonl\.gz cannot be read",
        ),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be read past row 0"),
        ("a.txt", "é".encode("latin-1"), r"a\.txt cannot be read past row 0 .*utf-8"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_a_truncated_zstd_file_is_not_taken_for_a_short_one(folder: Path) -> None:
    path = folder / "a.jsonl.zst"
    write_zstd(path, lines(*({"text": os.urandom(50).hex()} for _ in range(5000))))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read past row"):
        read(folder)


def test_bad_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["x", None]}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: `text` is null"):
        read(folder)
    pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet")
    with pytest.raises(UserError, match="no column `text`"):
        read(folder)
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(5000)]}), folder / "a.parquet", compression="zstd")
    content = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(content[:500] + bytes(500) + content[1000:])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read past row"):
        read(folder)
    not_utf8 = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": not_utf8}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet cannot be read past row 0 .*utf-8"):
        read(folder)


def test_no_file_and_no_folder(folder: Path) -> None:
    (folder / "README.md").write_text("hello")
    with pytest.raises(UserError, match=r"has no file that matches .*put files there"):
        LocalSource(folder, "**/*").identity()
    with pytest.raises(UserError, match="is not a folder"):
        LocalSource(folder / "none", "**/*").identity()
    with pytest.raises(UserError, match="is not a glob"):
        LocalSource(folder, "/etc/*").identity()


def test_identity_follows_content_and_is_not_absolute(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    before = LocalSource(folder, "**/*").identity()
    assert str(folder) not in json.dumps(before)
    (folder / "a.txt").write_text("two")
    assert LocalSource(folder, "**/*").identity() != before


def test_reading_leaves_the_home_folder_alone_and_needs_no_torch(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "b.jsonl").write_bytes(lines({"text": "x"}))
    program = (
        "import sys; from pathlib import Path; from pipelib.corpus.local import LocalSource\n"
        "LocalSource(Path('texts'), '**/*').write(Path('raw'), Path('work'))\n"
        "assert 'torch' not in sys.modules"
    )
    home = folder.parent / "home"
    home.mkdir()
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], cwd=folder.parent, env=environment, check=True)
    assert not list(home.iterdir())


def test_kinds_that_are_not_read_are_named_and_capitals_do_not_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BOOK.TXT", "list.json", "notes.md", "a.html", "b.html", "c.html", "d.html", ".hidden.md"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("one text")
    source = LocalSource(tmp_path / "texts", "**/*")
    assert [file["name"] for file in source.identity()["files"]] == ["BOOK.TXT"]
    source.write(tmp_path / "raw", tmp_path)
    assert "so not a.html, b.html, c.html, d.html, list.json and 1 more" in capsys.readouterr().out
