"""Text in the shape that people have it: kinds of files, encodings, bad rows, documents of a txt file, their order."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import make_novel
from small_vocabulary import TOKENIZER
from test_tokens_encode_corpus import build_in

from pipelib.corpus import local_formats
from pipelib.corpus.local_formats import Reading, _json_values, read_rows
from pipelib.corpus.options import Options
from pipelib.corpus.params import encoding_name, kind_of_name
from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.raw import Document, Written, read_raw_manifest, write_manifest
from pipelib.corpus.shuffle import shuffle
from pipelib.corpus.sources.local import LocalSource
from pipelib.corpus.split import Cut, cut_text
from pipelib.corpus.text_files import Decoding
from pipelib.errors import UserError
from pipelib.tokens.encode_corpus import encode_corpus
from pipelib.tokens.params import TokenizeParams
from pipelib.vocabulary.choice import Vocabulary

TEXTS = [
    'He said "no", and\tleft.\n\nTwo lines later: naïve, 東京, 🎲.', "a,b;c|d", "'single' and \\ backslash \\n", "x\u2028y\x85z",
    "  spaces at both ends  ", "<|endoftext|>", "1.5", "null", "=1+1", "last",
]  # fmt: skip
ROWS = [{"text": text, "number": number} for number, text in enumerate(TEXTS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    return path


def read(folder: Path, **options: Any) -> tuple[Written, list[Any]]:
    """Every document's text."""
    out = folder.parent / "out"
    written = LocalSource(folder, "**/*", options=Options(**options)).write(out / "raw", out / "work")
    write_manifest(out / "raw", {}, written)
    return written, [row["text"] for row in iterate_raw(out / "raw")]


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ---- Kinds of files --------------------------------------------------------------------------------------------------


def saved_dict(path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(path))


def by_datasets(path: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_json(path)


def by_jq(path: Path, *options: str) -> None:
    content = subprocess.run(["jq", *options, "."], input=lines(*ROWS), stdout=subprocess.PIPE, check=True).stdout
    path.write_bytes(content)


def binary_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": [text.encode() for text in TEXTS], "id": [b"x"] * len(TEXTS)}), path)


def by_csv(path: Path, rows: Sequence[dict[str, Any]] = ROWS, **options: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


FRAME = pd.DataFrame(ROWS)
KINDS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda path: FRAME.to_csv(path, index=False),
    "b.csv": lambda path: FRAME.to_csv(path),  # with pandas' column without a name
    "a.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t"),
    "b.tsv": lambda path: FRAME.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_ALL),
    "a.csv.gz": lambda path: FRAME.to_csv(path, index=False),
    "c.csv": by_csv,
    "c.tsv": lambda path: by_csv(path, dialect="excel-tab"),
    "d.tsv": lambda path: by_csv(path, delimiter="\t", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"),
    "a.json": lambda path: FRAME.to_json(path, orient="records"),
    "b.json": lambda path: path.write_text(json.dumps(ROWS, indent=2)),
    "c.json": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "a.json.xz": lambda path: path.write_bytes(lzma.compress(json.dumps(ROWS).encode())),
    "a.jsonl": by_datasets,
    "b.jsonl": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "b.jsonl.gz": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "e.csv": lambda path: datasets.Dataset.from_list(ROWS).to_csv(path),
    "c.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "a.ndjson": lambda path: path.write_bytes(lines(*ROWS)),
    "a.ndjson.bz2": lambda path: path.write_bytes(bz2.compress(lines(*ROWS))),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(*ROWS))),
    "a.parquet": lambda path: FRAME.to_parquet(path),
    "b.parquet": binary_parquet,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    "shuffled": lambda path: (
        datasets.Dataset.from_list(ROWS[::-1]).select(range(len(ROWS) - 1, -1, -1)).save_to_disk(str(path))
    ),
    "dict": saved_dict,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_file_gives_the_same_texts(folder: Path, name: str) -> None:
    KINDS[name](folder / name)
    assert read(folder)[1] == TEXTS


def test_the_shards_of_all_kinds_are_those_of_jsonl(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(folder.parent / "state"))
    for name, write in KINDS.items():
        write(folder / name)
    plain = folder.parent / "plain/texts"
    plain.mkdir(parents=True)
    (plain / "a.jsonl").write_bytes(lines(*ROWS) * len(KINDS))
    shards = []
    for texts in (folder, plain):
        read(texts)
        build = build_in(texts.parent / "build")
        encode_corpus(build, texts.parent / "out/raw", TokenizeParams(1000, "none"), 0, Vocabulary(TOKENIZER, None))
        shards.append({path.name: path.read_bytes() for path in build.outs.rglob("*.bin")})
    assert len(shards[0]) > 2
    assert shards[0] == shards[1]


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize("options", [(), ("--compact-output",), ("--slurp",)])
def test_what_jq_prints(folder: Path, options: tuple[str, ...]) -> None:
    by_jq(folder / "a.json", *options)
    assert read(folder)[1] == TEXTS


PACKERS = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "zstd": ".zst"}


@pytest.mark.parametrize("program", PACKERS)
def test_what_programs_compress(folder: Path, program: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    for name in ("a.csv", "a.jsonl", "a.tsv", "b.json", "c.txt"):
        KINDS.get(name, lambda path: path.write_text("a book\n"))(folder / name)
        subprocess.run([program, name], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        (folder / name).unlink(missing_ok=True)  # zstd leaves it
    assert {path.suffix for path in folder.iterdir()} == {PACKERS[program]}
    assert read(folder)[1] == [*TEXTS * 4, "a book\n"]


@pytest.mark.parametrize(("ending", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_txt_files_may_be_compressed(folder: Path, ending: str, pack: Callable[[bytes], bytes]) -> None:
    (folder / f"a.txt{ending}").write_bytes(pack("one\r\ntwo é\n".encode()))
    assert read(folder)[1] == ["one\ntwo é\n"]


def test_every_file_of_a_saved_dataset_decides(folder: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"), num_shards=2)
    identity = LocalSource(folder, "**/*").identity()
    names = {file["name"] for file in identity["files"]}
    assert {"saved/state.json", "saved/dataset_info.json", "saved/data-00001-of-00002.arrow"} <= names


def test_files_beside_a_saved_dataset_are_read(folder: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    (folder / "saved/mine.txt").write_text("mine")
    (folder / "state.json").write_text('[{"text": "Alabama"}]')  # the user's own
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(folder / "empty"))
    assert read(folder)[1] == ["mine", *TEXTS, "Alabama"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv.gz", ".csv"),
        ("a.tsv.csv", ".csv"),
        ("A.TXT.GZ", ".txt"),
        (".txt", ".txt"),
        ("a", ""),
        ("a.csv.backup", ".backup"),
    ],
)
def test_the_kind_of_a_name(name: str, kind: str) -> None:
    assert kind_of_name(name) == kind


def test_an_open_quote_does_not_swallow_rows(folder: Path) -> None:
    rows = "".join(f"good {number},1\n" for number in range(100))
    (folder / "a.csv").write_text(f'text,id\n{rows}"open,1\n{rows}"ok then",5\n')
    with pytest.raises(UserError, match=r"cannot be read after row 100 \(line 102 opens a quote"):
        read(folder, bad_rows="skip")


LITERAL = [
    '"Hello," she said.', '"Quoted as a whole"', "plain", 'an inch: 5"', '"', 'the "middle"', '"" twice', '"to be', 'or not"',
    "back\\slash",
]  # fmt: skip
"""Texts without tabs and line ends, whose quotes are text where nothing is quoted."""


def literal_rows(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "number": number} for number, text in enumerate(texts)]


def test_a_tsv_file_without_quoting_is_read_as_it_is(folder: Path) -> None:
    rows = literal_rows(*LITERAL)
    pd.DataFrame(rows).to_csv(folder / "a.tsv", index=False, sep="\t", quoting=csv.QUOTE_NONE)
    by_csv(folder / "b.tsv", rows, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
    (folder / "c.tsv").write_text("text\n" + "\n".join(LITERAL))
    (folder / "d.tsv").write_text('text\tid\n"Hello\tthere"\n')
    assert read(folder)[1] == [*LITERAL * 3, '"Hello']


PAIRED = 'text\tid\n"to be\t0\nor not"\t1\nthat is\t2\n'
"""Two texts with a quote each, or a text of two lines between quotes."""


def test_quotes_that_two_texts_or_one_may_have_are_refused(folder: Path) -> None:
    (folder / "a.tsv").write_text(PAIRED)
    with pytest.raises(UserError, match=r"a\.tsv, line 3: it is unknown whether a quote .* write the file as \.jsonl"):
        read(folder)


@pytest.mark.parametrize(
    ("more", "texts"),
    [
        ('"what" else\t3\n', ['"to be', 'or not"', "that is", '"what" else']),
        ('"say ""no"""\t3\n', ["to be\t0\nor not", "that is", 'say "no"']),
        ('"two\nlines"\t3\n', ["to be\t0\nor not", "that is", "two\nlines"]),
    ],
)
def test_another_row_decides_what_quotes_are(folder: Path, more: str, texts: list[str]) -> None:
    (folder / "a.tsv").write_text(PAIRED + more)
    assert read(folder)[1] == texts


@pytest.mark.parametrize("text", ['he said ""no"""', 'he said ""no"",\nand left"'])
def test_a_tsv_file_with_quoting_and_an_error_is_not_read_as_one_without(folder: Path, text: str) -> None:
    (folder / "a.tsv").write_text(f'text\tid\n"{text}\t1\n"open"ed\t2\nlast\t3\n')
    with pytest.raises(UserError, match=r"a\.tsv, row 2: line \d is not tsv .*fix this row"):
        read(folder)
    assert read(folder, bad_rows="skip")[1] == [f'"{text}'[1:-1].replace('""', '"'), "last"]


def texts_of(path: Path) -> list[str]:
    return [
        row["text"]
        for _, row in read_rows(path, path.name, Reading("text", Decoding("utf-8", "refuse"), Cut("whole", "")))
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text('a"\t\n', max_size=8).map("x{}".format)), st.sampled_from([0, 1, 2]))
def test_tsv_with_quoting_is_read_as_written_or_refused(texts: list[str], quoting: int) -> None:
    rows = literal_rows("first", *texts)
    with tempfile.TemporaryDirectory() as folder:
        by_csv(Path(folder) / "a.tsv", rows, delimiter="\t", quoting=quoting)
        try:
            found = texts_of(Path(folder) / "a.tsv")
        except UserError as error:
            found = [str(error)]
    assert found == ["first", *texts] or "it is unknown whether a quote" in found[0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.from_regex('[a" ]{0,6}a[a" ]{0,6}', fullmatch=True)))
def test_tsv_without_quoting_is_read_as_written(texts: list[str]) -> None:
    texts = ['"So" begins a text of words', *(text.replace('""', "''") for text in texts)]
    with tempfile.TemporaryDirectory() as folder:
        by_csv(Path(folder) / "a.tsv", literal_rows(*texts), delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None)
        assert texts_of(Path(folder) / "a.tsv") == texts


def test_a_tsv_file_of_one_column_may_have_empty_lines(folder: Path) -> None:
    (folder / "a.tsv").write_text('text\n"two\nlines"\n\nlast\n')
    assert read(folder)[1] == ["two\nlines", "last"]


def test_stray_bytes_of_a_tsv_file_are_counted_once(folder: Path) -> None:
    (folder / "a.tsv").write_bytes(b'text\n"it\x92s\n')
    written, texts = read(folder, stray_bytes="replace")
    assert texts == ['"it\ufffds']
    assert written.counts["stray_bytes_replaced"] == 1


def test_arrays_may_follow_each_other(folder: Path) -> None:
    (folder / "a.json").write_text('[{"text": "a"}]\n[{"text": "b"}, {"text": "c"}]\n{"text": "d"}')
    assert read(folder)[1] == ["a", "b", "c", "d"]


def test_numbers_of_a_csv_file_fit_their_columns(folder: Path) -> None:
    pd.DataFrame({"text": ["a", "b", "c"], "token_count": [7, None, 8], "score": [2.5, None, 3]}).to_csv(
        folder / "a.csv"
    )
    written, _ = read(folder)
    rows = list(iterate_raw(folder.parent / "out/raw", ("token_count", "score")))
    assert rows == [{"token_count": 7, "score": 2.5}, dict.fromkeys(rows[0]), {"token_count": 8, "score": 3.0}]
    assert written.counts["values_dropped"] == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"body,id\nx,1\n", r"a\.csv has no column `text` in its first line \(body, id\)"),
        ("a.csv", b"text,text\nx,1\n", r"a\.csv has 2 columns `text`"),
        ("a.csv", b"", r"a\.csv has no column `text`"),
        (
            "a.csv",
            b'text\nx\n"open\nmore\n',
            r"a\.csv cannot be read after row 1 \(line 3 opens a quote that is not closed well",
        ),
        ("a.csv", b"text;id\nx;1\n", r"no column `text` .*separated by semicolons"),
        ("a.csv", b"text\nx\0y\n", r"a\.csv, line 2: there is a NUL byte"),
        ("a.json", b'[[{"text": "x"}]]', r"a\.json .*an array is inside of an array"),
        ("a.csv", b"text,id\nx,1,2\n", r"a\.csv, row 1 has 3 values for 2 columns"),
        ("a.csv", b'text\n"x"y\n', r"a\.csv, row 1: line 2 is not csv"),
        ("a.json", b'[{"text": "x"}', r"a\.json cannot be read after row 1 \(its array does not end\)"),
        ("a.json", b'[{"text": "x"}, {"te', r"a\.json cannot be read after row 1 \(.* is not JSON"),
        ("a.json", b'{"text": "x"} rubbish', r"a\.json cannot be read after row 1 \('rubbish' is not JSON"),
        ("a.json", b"[1]", r"a\.json, row 1: 1 is not an object"),
        ("a.json", b"[" * 100_000, r"a\.json cannot be read after row 0"),
        ("a.json.bz2", b"no bzip2", r"a\.json\.bz2 cannot be read after row 0"),
        ("a.json.xz", b"no xz", r"a\.json\.xz cannot be read after row 0"),
        ("a.txt", bz2.compress(b"x"), r"a\.txt is compressed by bzip2"),
        ("a.json.xz", lzma.compress(lzma.compress(b"{}")), r"a\.json\.xz, unpacked, is compressed by xz"),
    ],
)
def test_damage_is_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(folder)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(VALUES, max_size=8), st.integers(1, 20), st.booleans())
def test_json_is_read_in_blocks_of_any_length(values: list[Any], block: int, is_array: bool) -> None:
    values = [value for value in values if not isinstance(value, list)]  # see the two tests of arrays above
    one_by_one = "\n".join(json.dumps(value) for value in values)
    text = json.dumps(values, indent=1) if is_array else one_by_one
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_formats, "_BLOCK_CHARACTERS", block)
        assert list(_json_values(io.StringIO(text))) == values


# ---- Columns and rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "saved"])
def test_another_column_is_the_text(folder: Path, name: str) -> None:
    rows = [{"text": 5, "content": text} for text in TEXTS]
    match name:
        case "a.parquet":
            pd.DataFrame(rows).to_parquet(folder / name)
        case "a.csv":
            pd.DataFrame(rows).to_csv(folder / name)
        case "a.jsonl":
            (folder / name).write_bytes(lines(*rows))
        case _:
            datasets.Dataset.from_list(rows).save_to_disk(str(folder / name))
    assert read(folder, text_column="content")[1] == TEXTS
    assert LocalSource(folder, "**/*", options=Options(text_column="content")).identity()["text_column"] == "content"
    with pytest.raises(UserError, match="`body`"):
        read(folder, text_column="body")


PLANTED: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b"{half", "not JSON"),
    ("a.jsonl", b"{'text': 'x'}", "not JSON"),
    ("a.jsonl", b'{"text": "a\ttab"}', "not JSON"),
    ("a.jsonl", b'{"text": "cut', "JSON is cut short"),
    ("a.jsonl", b'{"text": "x", "id": ', "JSON is cut short"),
    ("a.jsonl", b'{"text": "x"} more', "text after JSON"),
    ("a.jsonl", b'{"text": "x"}{"text": "y"}', "text after JSON"),
    ("a.jsonl", b"[" * 100_000, "JSON is nested too deeply"),
    ("a.jsonl", b'["x"]', "row is a list"),
    ("a.jsonl", b'"x"', "row is text"),
    ("a.jsonl", b"null", "row is empty"),
    ("a.jsonl", b"17", "row is a whole number"),
    ("a.jsonl", b"{}", "no text"),
    ("a.jsonl", b'{"body": "x"}', "no text"),
    ("a.jsonl", b'{"text": 5}', "text is a whole number"),
    ("a.jsonl", b'{"text": "\\ud800"}', "not Unicode"),
    ("b.csv", b"x,1,2", "too many values"),
    ("b.csv", b"x", "too few values"),
    ("b.csv", b'"x"y,1', "not csv"),
    ("c.tsv", b"x\t1\t2", "too many values"),
    ("c.tsv", b"x,1", "too few values"),
    ("c.tsv", b'"x"y\t1', "not tsv"),
    ("d.json", b"0.5", "row is a number"),
    ("d.json", b"true", "row is true/false"),
    ("d.json", b'{"text": 0.5}', "text is a number"),
    ("d.json", b'{"text": true}', "text is true/false"),
    ("d.json", b'{"text": ["x"]}', "text is a list"),
    ("d.json", b'{"text": {"a": "x"}}', "text is a section"),
    ("e.parquet", b"\xff", "stray bytes"),
    ("f", b"it\x92s", "stray bytes"),
]
"""File, bad row, reason. `f` is a saved dataset."""
FILES = sorted({name for name, _, _ in PLANTED})
REASONS = [reason for _, _, reason in PLANTED]


def good_text(number: int) -> str:
    return f'good "{number}"'


def good_row(name: str, number: int) -> bytes:
    text = good_text(number)
    as_json, quoted = json.dumps({"text": text}), text.replace('"', '""')
    rows = {".csv": f'"{quoted}",1', ".tsv": f'"{quoted}"\t1', ".json": as_json, ".jsonl": as_json}
    return rows.get(Path(name).suffix, text).encode()


def write_rows(path: Path, rows: Sequence[bytes]) -> None:
    table = pa.table({"text": pa.array(rows, pa.binary()).view(pa.string())})
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path)
        case "":
            datasets.Dataset(table).save_to_disk(str(path))
        case ".json":
            path.write_bytes(b"[" + b",\n".join(rows) + b"]")
        case kind:
            header = {".csv": [b"text,id"], ".tsv": [b"text\tid"]}.get(kind, [])
            path.write_bytes(b"\n".join([*header, *rows]))


def plant(folder: Path, names: Sequence[str], good: int) -> list[str]:
    """Write files with the planted rows among `good` good ones each, and return the good texts."""
    for name in names:
        rows = [good_row(name, number) for number in range(good)]
        for number, row in enumerate(row for file, row, _ in PLANTED if file == name):
            rows.insert(2 + 3 * number, row)
        write_rows(folder / name, rows)
    return [good_text(number) for number in range(good)] * len(names)


def test_bad_rows_are_skipped_and_counted_by_reason(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(set(REASONS)) > 20
    good = plant(folder, FILES, good=600)
    written, texts = read(folder, bad_rows="skip")
    assert texts == good
    assert written.counts["bad_rows"] == {reason: REASONS.count(reason) for reason in set(REASONS)}
    shown = capsys.readouterr().out
    assert "local: bad rows are left out (not JSON): 3; the first is a.jsonl, row 3: this line is not JSON" in shown


@pytest.mark.parametrize("place", range(len(PLANTED)))
def test_a_bad_row_is_refused_by_its_file_and_row(folder: Path, place: int) -> None:
    name, row, reason = PLANTED[place]
    write_rows(folder / name, [good_row(name, 1), row])
    with pytest.raises(UserError, match=rf"{name}.*, row 2.*fix this row, skip it with download.bad_rows: skip"):
        read(folder)
    written, texts = read(folder, bad_rows="skip")
    assert texts == [good_text(1)]
    assert written.counts["bad_rows"] == {reason: 1}


def test_too_many_bad_rows_are_another_corpus(folder: Path) -> None:
    plant(folder, FILES, good=400)
    with pytest.raises(UserError, match=r"30 of 2,430 rows are bad, more than 1%, .*\n  - 3 not JSON: a\.jsonl, row 3"):
        read(folder, bad_rows="skip")


def test_a_few_bad_rows_of_a_small_corpus_are_skipped(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines({"text": "x"}, *[{"body": "y"}] * 10))
    assert read(folder, bad_rows="skip")[1] == ["x"]


# ---- Encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8"])
def test_encodings(folder: Path, encoding: str) -> None:
    (folder / "a.jsonl").write_bytes('{"text": "naïve\\n"}\r\n{"text": "Ω"}\r\n'.replace("Ω", "o").encode(encoding))
    (folder / "b.txt").write_bytes("été\r\n".encode(encoding))
    assert read(folder, encoding=encoding)[1] == ["naïve\n", "o", "été\n"]


def test_byte_order_marks_are_left_out_or_contradict(folder: Path) -> None:
    (folder / "a.txt").write_bytes("\ufeffé".encode("utf-16-le"))
    assert read(folder, encoding="utf-16-le")[1] == ["é"]
    (folder / "a.txt").write_bytes("\ufeffé".encode())
    assert read(folder)[1] == ["é"]
    with pytest.raises(UserError, match=r"a\.txt is UTF-8\. .*set download.encoding: utf-8"):
        read(folder, encoding="cp1252")
    (folder / "a.txt").write_bytes(b"plain")
    for encoding in ("utf-16", "utf-32"):
        with pytest.raises(UserError, match=rf"a\.txt.* is not {encoding.upper()}"):
            read(folder, encoding=encoding)


def test_only_encodings_of_text_are_known() -> None:
    assert encoding_name("UTF8") == "utf-8"
    for name in ("base64", "hex", "rot13", "zlib", "idna", "punycode", "undefined", "nothing", "", "a\0"):
        assert encoding_name(name) is None


def test_a_string_column_is_utf8_whatever_the_encoding_of_files(folder: Path) -> None:
    column = pa.array(["naïve".encode(), b"it\x92s"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), folder / "a.parquet")
    assert read(folder, encoding="cp1252", stray_bytes="replace")[1] == ["naïve", "it\ufffds"]


def test_chinese(folder: Path) -> None:
    (folder / "a.txt").write_bytes("中文\n".encode("gbk") * 5000)  # characters at the edges of the decoder's blocks
    assert read(folder, encoding="gbk")[1] == ["中文\n" * 5000]


DICTIONARY = b"".join(b"word %d\tmeaning\n" % number for number in range(30_000)) + b"it\x92s\nafter\n" + b"x\n" * 9999
"""All UTF-8 but for one apostrophe of cp1252, far from the start."""


def test_a_stray_byte_is_named_by_its_line_and_can_be_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "words.txt").write_bytes(DICTIONARY)
    message = r"words\.txt, line 30001: there is the byte 0x92, which is not UTF-8, .*cp1252.*stray_bytes: replace"
    with pytest.raises(UserError, match=message):
        read(folder)
    written, texts = read(folder, stray_bytes="replace")
    assert written.counts["stray_bytes_replaced"] == 1
    assert "".join(texts) == DICTIONARY.decode(errors="replace")
    assert "bytes that are not utf-8 were replaced by U+FFFD: 1" in capsys.readouterr().out
    assert "it’s" in "".join(read(folder, encoding="cp1252")[1])


def test_stray_bytes_of_other_encodings_are_named_too(folder: Path) -> None:
    (folder / "a.txt").write_bytes("中文\n".encode("gbk") * 3 + b"\xff\n")
    with pytest.raises(UserError, match=r"a\.txt, line 4: there is the byte 0xff, which is not GBK"):
        read(folder, encoding="gbk")


def test_stray_bytes_of_a_binary_column(folder: Path) -> None:
    pq.write_table(pa.table({"text": [b"it\x92s", b"x"]}), folder / "a.parquet")
    assert read(folder, encoding="cp1252")[1] == ["it’s", "x"]
    assert read(folder, stray_bytes="replace")[1] == ["it\ufffds", "x"]
    assert read(folder, bad_rows="skip")[1] == ["x"]


# ---- The documents of a txt file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split": "whole"}, ["a\nb\n\n \nc\n<sep>d\n"]),
        ({"split": "line"}, ["a", "b", "c", "<sep>d"]),
        ({"split": "empty_line"}, ["a\nb", "c\n<sep>d"]),
        ({"split": "separator", "separator": "<sep>"}, ["a\nb\n\n \nc", "d"]),
    ],
)
def test_documents_of_a_txt_file(folder: Path, options: dict[str, str], expected: list[str]) -> None:
    (folder / "a.txt").write_text("a\nb\n\n \nc\n<sep>d\n")
    assert read(folder, **options)[1] == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("ab<se", max_size=6), max_size=6), st.integers(1, 9))
def test_a_separator_may_lie_on_the_edge_of_a_block(texts: list[str], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelib.corpus.split._BLOCK_CHARACTERS", block)
        found = list(cut_text(io.StringIO("<sep>".join(texts)), Cut("separator", "<sep>")))
    assert found == [text for text in "<sep>".join(texts).split("<sep>") if text]


@pytest.mark.parametrize("between", ["\n", "\n\n"])
def test_little_text_is_cut_into_about_500_documents(folder: Path, between: str) -> None:
    text = between.join(f"paragraph {number}: {'word ' * 30}" for number in range(30_000))
    (folder / "a.txt").write_text(text)
    _, texts = read(folder, split="auto")
    assert "".join(texts) == text
    assert 200 < len(texts) < 510


@pytest.mark.parametrize("between", [" ", ""])
def test_a_long_line_is_cut_too(folder: Path, between: str) -> None:
    text = between.join(["word"] * 400_000)
    (folder / "a.txt").write_text(text)
    _, texts = read(folder, split="auto")
    assert "".join(texts) == text
    assert len(texts) > 100


@pytest.mark.parametrize("between", ["\n", "\n\n", ""])
def test_chinese_is_cut_into_as_many_documents(folder: Path, between: str) -> None:
    text = make_novel(5000, between)
    (folder / "a.txt").write_text(text)
    _, texts = read(folder, split="auto")
    assert "".join(texts) == text
    assert 100 < len(texts) < 510
    assert all(text.rstrip("\n").endswith("。") for text in texts)


def test_much_text_is_cut_as_without_auto() -> None:
    assert Cut.of("auto", "", 60_000_000).characters == Cut.of("whole", "", 0).characters
    assert Cut.of("auto", "", 60_000_000).limit == Cut.of("whole", "", 0).limit
    assert Cut.of("auto", "", 0).characters == 2000


# ---- Order -----------------------------------------------------------------------------------------------------------


def documents(count: int) -> list[tuple[str, Document]]:
    return [(f"a.jsonl:{number}", Document(f"text {number}")) for number in range(count)]


def test_an_order_that_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = list(shuffle(documents(1000), 1, 1, tmp_path / "one"))
    monkeypatch.setattr("pipelib.corpus.shuffle._BUFFER_BYTES", 100)
    (tmp_path / "many").mkdir()
    (tmp_path / "many/0").write_bytes(b"left by a killed run")
    assert list(shuffle(documents(1000), 1, 9000, tmp_path / "many", bucket_bytes=100)) == one
    assert sorted(one) == sorted(document for _, document in documents(1000))
    assert not list(tmp_path.iterdir())
    assert list(shuffle(documents(1000), 2, 1, tmp_path / "other")) != one
    in_order = [document for _, document in documents(1000)]
    assert sum(mine == theirs for mine, theirs in zip(one, in_order, strict=True)) < 20


def test_more_documents_leave_the_order_of_the_others(tmp_path: Path) -> None:
    few = list(shuffle(documents(500), 1, 1, tmp_path / "work"))
    many = list(shuffle(documents(1000), 1, 1, tmp_path / "work"))
    assert [document for document in many if document in set(few)] == few


def test_files_for_validation_come_first_and_are_not_shuffled(folder: Path) -> None:
    for name in ("a", "held/b", "c"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_bytes(lines(*({"text": f"{name} {number}"} for number in range(20))))
    written, texts = read(folder, validation="held/*", shuffle_seed=7)
    held = [f"held/b {number}" for number in range(20)]
    assert texts[:20] == held
    assert texts[20:] != sorted(texts[20:])
    assert written.validation_documents == 20
    assert read_raw_manifest(folder.parent / "out/raw").validation_documents == 20
    (folder / "d.jsonl").write_bytes(lines({"text": "more"}))
    for pattern in ("held/*", "held/**", "held"):
        assert read(folder, validation=pattern, shuffle_seed=7)[1][:20] == held


def test_more_text_for_training_leaves_the_documents_for_validation(folder: Path) -> None:
    (folder / "held.txt").write_text("a paragraph of some words\n\n" * 20_000)
    found = []
    for size in (10_000, 500_000):
        (folder / "more.txt").write_text("other words\n\n" * size)
        written, texts = read(folder, split="auto", validation="held.txt")
        found.append(texts[: written.validation_documents])
    assert found[0] == found[1]
    assert len(found[0]) > 100


def test_validation_files_without_text_are_refused(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(lines({"text": "x"}))
    (folder / "b.jsonl").write_bytes(lines({"text": " "}))
    with pytest.raises(UserError, match=r"download\.validation: b\.jsonl has no text"):
        read(folder, validation="b*")


def test_max_tokens_counts_the_text_for_training(folder: Path) -> None:
    for name in "ab":
        (folder / f"{name}.jsonl").write_bytes(lines(*({"text": f"{name}{number} four"} for number in range(9))))
    out = folder.parent / "cut"
    options = Options(validation="b.jsonl")
    written = LocalSource(folder, "**/*", 4, options).write(out / "raw", out / "work")
    write_manifest(out / "raw", {}, written)
    assert [row["text"][0] for row in iterate_raw(out / "raw")] == ["b"] * 9 + ["a"] * 2


@pytest.mark.parametrize(("pattern", "which"), [("none*", "none"), ("**/*", "each")])
def test_validation_files_that_leave_nothing_are_refused(folder: Path, pattern: str, which: str) -> None:
    (folder / "a.jsonl").write_bytes(lines({"text": "x"}))
    with pytest.raises(UserError, match=rf"download\.validation: .* matches {which} of the 1 files"):
        read(folder, validation=pattern)


def test_one_split_of_a_saved_dataset_trains_and_another_validates(folder: Path) -> None:
    """As docs/how-to/own-data.md has it."""
    splits = {name: datasets.Dataset.from_dict({"text": [name] * 3}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "dict"))
    assert read(folder)[1] == ["test"] * 3 + ["train"] * 3
    written, texts = read(folder, validation="**/test")
    assert (written.validation_documents, texts) == (3, ["test"] * 3 + ["train"] * 3)
    out = folder.parent / "train"
    written = LocalSource(folder, "**/train/*").write(out / "raw", out / "work")
    write_manifest(out / "raw", {}, written)
    assert [row["text"] for row in iterate_raw(out / "raw")] == ["train"] * 3
