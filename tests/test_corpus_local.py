"""The user's files: every kind is read, and every kind of damage is named."""

import contextlib
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelib.corpus.local_files import require_readable
from pipelib.corpus.parquet import SCHEMA, iterate_raw
from pipelib.corpus.raw import Written, write_manifest
from pipelib.corpus.sources.local import LocalSource
from pipelib.corpus.split import WHOLE_CHARACTERS
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
    write_manifest(out / "raw", {}, written)
    return written, list(iterate_raw(out / "raw", ("text", "id", "file_path", "score", "token_count")))


def test_every_kind_in_the_order_of_paths(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "a1", "id": "own"}, {"text": "a2", "other": [1]}))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines({"text": "b1"})) + gzip.compress(lines({"text": "b2"})))
    write_zstd(folder / "c.jsonl.zst", lines({"text": "c1"}), lines({"text": "c2\u2028still"}))
    pq.write_table(pa.table({"text": ["d1"], "score": [4.5], "id": [7], "junk": [b"x"]}), folder / "d.parquet")
    (folder / "sub/e.txt").write_bytes("e1 é\r\n\r\nmore\r\n".encode())
    for ignored in ("README.md", ".hidden.txt", "sub/data.html"):
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
    assert len(str(rows[0]["text"])) < WHOLE_CHARACTERS + len(paragraph)


def test_empty_texts_are_left_out_and_counted(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines({"text": ""}, {"text": " \n"}, {"text": "x"}) + b"\n\n")
    (folder / "b.txt").write_text("\n")
    written, rows = read(folder)
    assert [row["text"] for row in rows] == ["x"]
    assert written.counts["empty_dropped"] == 3


COUNTED = gzip.compress(lines(*({"text": str(n)} for n in range(9999))))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
LONG_WINDOW = bytes.fromhex("28b52ffd 00 a8 090000 0a")
"""A frame of zstd with a window of 2 GB and one block of one byte as it is."""
NOT_USABLE = [
    ("a.jsonl", lines({"text": "x"}) + b"{half", r"a\.jsonl, row 2: this line is not JSON"),
    ("a.jsonl", lines({"text": "x"}, ["y"]), r"a\.jsonl, row 2: \['y'\] is not an object"),
    ("a.jsonl", lines({"text": "x"}, {"body": "y"}), r"a\.jsonl, row 2: there is no `text` \(only body\)"),
    ("a.jsonl", b"{}", r"a\.jsonl, row 1: there is no `text` \(only an empty object\)"),
    ("a.jsonl", lines({"text": 5}), r"a\.jsonl, row 1: `text` is 5, not a string"),
    ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, row 1: `text` is not Unicode"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl, row 1: this line is not JSON"),
    ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"a\.jsonl, row 1: this line is not JSON"),
    ("a.jsonl", lines({"text": "x"}) * 40_000 + b'{"text": "\xff"}', r"a\.jsonl, line 40001: there is the byte 0xff, .*UTF-8"),
    ("a.jsonl", lines({"text": "x"}) + bytes(512), r"a\.jsonl, line 2: there is a NUL byte"),
    ("a.jsonl", '{"text": "wide"}\n'.encode("utf-16-le"), r"a\.jsonl, line 1: there is a NUL byte, .*for example utf-16"),
    ("a.jsonl", LFS, r"a\.jsonl is a pointer of git LFS, .*`git lfs pull`"),
    ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz cannot be read after row 0 .*[Gg]zip"),
    ("a.jsonl.gz", LFS, r"a\.jsonl\.gz is a pointer of git LFS"),
    ("a.jsonl.gz", COUNTED[:-99], r"a\.jsonl\.gz cannot be read after row \d{4}"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), r"a\.jsonl\.gz, unpacked, is compressed by gzip"),
    ("a.jsonl.gz", gzip.compress('{"text": "x"}'.encode("utf-16")), r"a\.jsonl\.gz, unpacked, is UTF-16"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n{"text": "\xe9"}'), r"a\.jsonl\.gz, line 2: there is the byte 0xe9"),
    ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst cannot be read after row 0"),
    ("a.jsonl.zst", LONG_WINDOW, r"a\.jsonl\.zst was compressed with a long window .*zstd -d --long=31"),
    ("a.jsonl.gz", b"", r"a\.jsonl\.gz cannot be read after row 0 \(it is empty\)"),
    ("a.jsonl.zst", b"", r"a\.jsonl\.zst cannot be read after row 0 \(it is empty\)"),
    ("a.txt", "one\r\ntwo\rthree é".encode("latin-1"), r"a\.txt, line 3: there is the byte 0xe9"),
    ("a.txt", "wide".encode("utf-16"), r"a\.txt is UTF-16\. .*set download.encoding: utf-16"),
    ("a.txt", "wide".encode("utf-32"), r"a\.txt is UTF-32\. .*set download.encoding: utf-32"),
    ("a.txt", "one\ntwo\n".encode("utf-32-le"), r"a\.txt, line 1: there is a NUL byte"),
    ("a.txt", b"one\ntwo" + bytes(99), r"a\.txt, line 2: there is a NUL byte"),
    ("a.txt", LFS, r"a\.txt is a pointer of git LFS"),
    ("a.txt", b"/annex/objects/SHA256E-s1--0.txt\n", r"a\.txt is a pointer of git-annex"),
    ("a.txt", gzip.compress(b"x"), r"a\.txt is compressed by gzip"),
    ("a.txt", b"%PDF-1.7\n", r"a\.txt is a PDF"),
    ("a.parquet", b"PAR1 and no more", r"a\.parquet cannot be read as parquet"),
    ("a.parquet", b"", r"a\.parquet cannot be read as parquet"),
    ("a.parquet", LFS, r"a\.parquet is a pointer of git LFS"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), NOT_USABLE, ids=range(len(NOT_USABLE)))
def test_what_cannot_be_used_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_a_truncated_zstd_file_is_not_taken_for_a_short_one(folder: Path) -> None:
    path = folder / "a.jsonl.zst"
    write_zstd(path, lines(*({"text": os.urandom(50).hex()} for _ in range(5000))))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read after row"):
        read(folder)


def test_bad_parquet(folder: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), folder / "a.parquet")
    with pytest.raises(UserError, match="no column `text`"):
        read(folder)
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(5000)]}), folder / "a.parquet", compression="zstd")
    content = (folder / "a.parquet").read_bytes()
    (folder / "a.parquet").write_bytes(content[:500] + bytes(500) + content[1000:])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read after row"):
        read(folder)


def not_utf8(*values: bytes | None) -> pa.Array:
    return pa.array(values, pa.binary()).view(pa.string())


def test_a_row_of_parquet_that_is_not_utf8_is_named(folder: Path) -> None:
    texts = [b"x"] * 1500 + [b"\xff"]
    pq.write_table(pa.table({"text": not_utf8(*texts)}), folder / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1501: `text` has bytes that are not text"):
        read(folder)


def test_a_null_text_is_left_out_and_counted_as_an_empty_one_is(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["x", None, ""]}), folder / "a.parquet")
    (folder / "b.jsonl").write_bytes(lines({"text": None}, {"text": "y"}))
    written, rows = read(folder)
    assert [row["text"] for row in rows] == ["x", "y"]
    assert written.counts["empty_dropped"] == 3


def test_other_schema_metadata_changes_nothing(folder: Path) -> None:
    """`datasets` refused a file whose features were written by a version that it did not know."""
    table = pa.table({"text": ["x"]}).replace_schema_metadata(
        {"huggingface": '{"info": {"features": {"text": {"_type": "New"}}}}'}
    )
    pq.write_table(table, folder / "a.parquet")
    assert [row["text"] for row in read(folder)[1]] == ["x"]


# ---- Optional columns ------------------------------------------------------------------------------------------------

OPTIONAL = [name for name in SCHEMA.names if name != "text"]
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=3,
)


def test_values_of_optional_columns_that_do_not_fit_are_null_and_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (
        b'{"text": "a", "url": "\\ud800", "token_count": true, "score": 9007199254740993, "id": 7}\n'
        b'{"text": "b", "int_score": 9223372036854775808, "token_count": -1, "score": 3, "language_score": "0.9"}\n'
    )
    (folder / "a.jsonl").write_bytes(content)
    written, rows = read(folder)
    assert written.counts["values_dropped"] == 6
    assert [(row["id"], row["token_count"], row["score"]) for row in rows] == [
        ("a.jsonl:1", None, 2.0**53),
        ("a.jsonl:2", None, 3.0),
    ]
    assert (
        "values that do not fit the column `token_count` (int64) are null in the corpus: 2, the first in a.jsonl, row 1"
        in capsys.readouterr().out
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(OPTIONAL, JSON_VALUES)), min_size=1, max_size=4))
def test_no_value_of_an_optional_column_stops_the_import(rows: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "texts"
        folder.mkdir()
        (folder / "a.jsonl").write_bytes(lines(*({**row, "text": "x"} for row in rows)))
        out = Path(name) / "raw"
        written = LocalSource(folder, "**/*").write(out, Path(name))
        kept = pq.read_table(out / written.files[0].name, columns=OPTIONAL).to_pylist()
    assert len(kept) == len(rows)
    pairs = [(row[column], stored[column]) for row, stored in zip(rows, kept, strict=True) for column in row]
    assert written.counts["values_dropped"] == sum(
        value is not None and not same(value, stored) for value, stored in pairs
    )


def same(value: object, stored: object) -> bool:
    if isinstance(value, int) and not isinstance(value, bool) and isinstance(stored, float):
        value = float(value)
    return value == stored or (value != value and stored != stored)  # NaN


NUMBERS = [
    pa.int8(),
    pa.uint8(),
    pa.int32(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.decimal128(5, 2),
]
TIMES = [pa.date32(), pa.timestamp("ns", "UTC"), pa.time64("ns"), pa.duration("ms")]
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary(1)]
ARROW_VALUES: list[pa.Array] = [
    *(pa.array([1, None], kind) for kind in (*NUMBERS, *TIMES)),
    *(pa.array(["x", None], kind) for kind in (*STRINGS, pa.dictionary(pa.int32(), pa.string()))),
    pa.array([True, None]),
    pa.array([None, None], pa.null()),
    pa.array([[1], None], pa.list_(pa.int32())),
    pa.array([{"a": 1}, None], pa.struct({"a": pa.int32()})),
    pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32())),
    pa.array([2**64 - 1, None], pa.uint64()),
    pa.array([10**15, None], pa.timestamp("ms")),  # a year that Python does not have
    not_utf8(b"\xff", None),
]


@pytest.mark.parametrize("values", ARROW_VALUES, ids=lambda values: str(values.type))
def test_no_type_of_an_optional_column_stops_the_import(folder: Path, values: pa.Array) -> None:
    pq.write_table(pa.table({"text": ["x", "y"], **dict.fromkeys(OPTIONAL, values)}), folder / "a.parquet")
    written, _ = read(folder)
    stored = pq.read_table(folder.parent / "out/raw/000_00000.parquet").to_pylist()
    assert [row["text"] for row in stored] == ["x", "y"]
    defaults = {"id": "a.parquet:1", "file_path": "a.parquet"}
    kept = sum(stored[0][column] not in (None, defaults.get(column)) for column in OPTIONAL)
    assert written.counts["values_dropped"] == (len(OPTIONAL) - kept if values[0].is_valid else 0)


def test_a_column_that_occurs_twice_is_left_out(folder: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array([1.0]), pa.array([2.0])], names=["text", "score", "score"])
    pq.write_table(table, folder / "a.parquet")
    assert read(folder)[1][0]["score"] is None


# ---- Damage ----------------------------------------------------------------------------------------------------------


def whole_files() -> dict[str, bytes]:
    """A small file of every kind."""
    rows = lines(*({"text": f"some text é {number}", "score": 1.5} for number in range(20)))
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(rows)
    parquet = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [f"some text {number}" for number in range(20)], "score": [1.5] * 20}), parquet)
    return {
        "a.jsonl": rows,
        "a.jsonl.gz": gzip.compress(rows),
        "a.jsonl.zst": sink.getvalue().to_pybytes(),
        "a.txt": rows,
        "a.parquet": parquet.getvalue().to_pybytes(),
    }


WHOLE = whole_files()


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_byte_is_text_or_named(name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[name])
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    read_or_refuse(name, bytes(content))


@pytest.mark.parametrize("name", WHOLE)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_file_cut_short_is_text_or_named(name: str, data: st.DataObject) -> None:
    read_or_refuse(name, WHOLE[name][: data.draw(st.integers(0, len(WHOLE[name]) - 1))])


def read_or_refuse(name: str, content: bytes) -> None:
    """Read a file; no other error than the user's may come of it."""
    with tempfile.TemporaryDirectory() as folder, suppress(UserError):
        (Path(folder) / name).write_bytes(content)
        LocalSource(Path(folder), "**/*").write(Path(folder) / "raw", Path(folder))


# ---- Separators ------------------------------------------------------------------------------------------------------


def test_end_of_text_in_a_file_is_text_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "stories.txt").write_text("one<|endoftext|>\ntwo<|endoftext|>\n")
    (folder / "z.txt").write_text("three<|endoftext|>")
    written, rows = read(folder)
    assert len(rows) == 2
    assert written.counts["end_of_text_strings"] == 3
    said = capsys.readouterr().out
    assert "texts contain <|endoftext|> (occurrences: 3, documents: 2, first in stories.txt, row 1)" in said
    assert "download.split: separator" in said


# ---- The folder ------------------------------------------------------------------------------------------------------


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:  # a path of a socket has 107 bytes
        server.bind(path.name)


def make_bad_name(path: Path) -> None:
    Path(os.fsdecode(os.fsencode(path.parent) + b"/b\xff.txt")).write_text("x")


def make_repository(path: Path) -> None:
    (path / ".dvc").mkdir(parents=True)


ODD: list[tuple[Callable[[Path], object], str]] = [
    (make_fifo, "odd.txt is not a file"),
    (make_socket, "odd.txt is not a file"),
    (lambda path: path.symlink_to("nowhere.txt"), r"odd.txt is a link to nowhere.txt, which does not exist"),
    (lambda path: path.symlink_to(path), "odd.txt is a link to .*, which does not exist"),
    (lambda path: path.symlink_to("/dev/null"), "odd.txt is a link to something that is not a file"),
    (
        lambda path: path.symlink_to(path.parents[2]),
        "odd.txt is a link to a folder, and DVC would not notice changes in it",
    ),
    (make_bad_name, r"b\\xff.txt has a name that is not UTF-8"),
    (make_repository, "odd.txt is a DVC repository"),
    (lambda path: path.with_name(".dvcignore").write_text("x"), r"\.dvcignore is not allowed inside a dependency"),
]


@pytest.mark.parametrize(("make", "message"), ODD)
def test_what_dvc_cannot_track_is_named(folder: Path, make: Callable[[Path], object], message: str) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "sub").mkdir()
    make(folder / "sub/odd.txt")
    with pytest.raises(UserError, match=message):
        LocalSource(folder, "**/*").identity()


def test_several_odd_files_are_named_at_once_and_many_are_cut(folder: Path) -> None:
    for number in range(9):
        (folder / f"{number}.txt").symlink_to("nowhere")
    with pytest.raises(UserError) as raised:
        LocalSource(folder, "**/*").identity()
    assert str(raised.value).count("is a link to nowhere") == 5
    assert "and more" in str(raised.value)


def test_a_linked_folder_matters_only_where_it_is_read(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "linked").symlink_to(folder.parent)
    require_readable(folder, links=False)
    (folder / "linked").rename(folder / ".linked")
    require_readable(folder, links=True)


def test_links_to_files_and_a_link_in_place_of_the_folder_are_followed(folder: Path) -> None:
    (folder.parent / "other.txt").write_text("linked")
    (folder / "a.txt").symlink_to(folder.parent / "other.txt")
    (folder.parent / "link").symlink_to(folder)
    assert [row["text"] for row in read(folder.parent / "link")[1]] == ["linked"]


def test_names_of_every_class_are_read(folder: Path) -> None:
    names = [
        "a::b.txt",
        "new\nline.txt",
        "back\\slash.txt",
        "we[i]rd*?.txt",
        "é東.txt",
        " space .txt",
        "-dash.txt",
        "%41.txt",
        "http:x.txt",
    ]
    for name in names:
        (folder / name).write_text(name)
    written, rows = read(folder)
    assert sorted(str(row["text"]) for row in rows) == sorted(names)
    assert written.files[0].rows == len(names)


def test_a_single_file_is_a_corpus(folder: Path) -> None:
    (folder / "book.txt").write_text("one book")
    (folder / "other.txt").write_text("another")
    source = LocalSource(folder / "book.txt", "*.parquet")
    assert [file["name"] for file in source.identity()["files"]] == ["book.txt"]
    written = source.write(folder.parent / "raw", folder)
    assert written.counts["characters"] == 8
    (folder / "book.pdf").write_text("one book")
    with pytest.raises(UserError, match=r"book\.pdf is not of a kind that can be read"):
        LocalSource(folder / "book.pdf", "**/*").identity()


def test_a_path_that_nobody_expands_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    for path in ("~/texts", "$HOME/texts", "${HOME}/texts"):
        with pytest.raises(UserError, match=r"DVC expands neither ~ nor variables.*write /home/someone/texts"):
            LocalSource(Path(path), "**/*").identity()


def test_no_file_and_no_folder(folder: Path) -> None:
    (folder / "README.md").write_text("hello")
    with pytest.raises(UserError, match=r"has no file that matches .*put files there"):
        LocalSource(folder, "**/*").identity()
    with pytest.raises(UserError, match="does not exist, so there is no text"):
        LocalSource(folder / "none", "**/*").identity()
    with pytest.raises(UserError, match="is not a glob"):
        LocalSource(folder, "/etc/*").identity()


def test_identity_follows_content_and_is_not_absolute(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    before = LocalSource(folder, "**/*").identity()
    assert str(folder) not in json.dumps(before)
    (folder / "a.txt").write_text("two")
    assert LocalSource(folder, "**/*").identity() != before


def test_reading_makes_no_request_leaves_the_home_folder_alone_and_needs_no_torch(folder: Path) -> None:
    for name, content in WHOLE.items():
        (folder / name).write_bytes(content)
    home = folder.parent / "home"
    home.mkdir()
    hook = folder.parent / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(  # every process that Python starts here runs it first
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    assert event not in ('socket.connect', 'socket.getaddrinfo'), (event, arguments)\n"
        "sys.addaudithook(refuse)\n"
    )
    program = (
        "import sys; from pathlib import Path; from pipelib.corpus.sources.local import LocalSource\n"
        "LocalSource(Path('texts'), '**/*').write(Path('raw'), Path('work'))\n"
        "assert not {'torch', 'datasets', 'huggingface_hub'} & set(sys.modules)"
    )
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join([str(hook), *sys.path])}
    subprocess.run([sys.executable, "-c", program], cwd=folder.parent, env=environment, check=True)
    assert not list(home.iterdir())
    connecting = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"]
    assert (
        b"socket.getaddrinfo" in subprocess.run(connecting, env=environment, capture_output=True).stderr
    )  # the hook works


def test_datasets_loads_what_was_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # else it asks the hub for a script of that name
    for name, content in WHOLE.items():
        (folder / name).write_bytes(content)
    _, rows = read(folder)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "out/raw/*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.column_names == SCHEMA.names
    assert loaded["text"][:] == [row["text"] for row in rows]


def test_kinds_that_are_not_read_are_named_and_capitals_do_not_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("BOOK.TXT", "list.xml", "notes.md", "a.html", "b.html", "c.html", "d.html", ".hidden.md"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text("one text")
    source = LocalSource(tmp_path / "texts", "**/*")
    assert [file["name"] for file in source.identity()["files"]] == ["BOOK.TXT"]
    source.write(tmp_path / "raw", tmp_path)
    assert (
        "because their kind cannot be read: a.html, b.html, c.html, d.html, list.xml and 1 more"
        in capsys.readouterr().out
    )
