"""Units: cut by the file alone, encoded in pieces without changing a token, whole or not there."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_corpus import make_texts, write_raw_files

from pipelib.corpus.raw import RawFile, RawManifest, read_raw_manifest
from pipelib.errors import UserError
from pipelib.files import sha256_file
from pipelib.tokens import texts as texts_module
from pipelib.tokens import units as module
from pipelib.tokens.texts import chunks, read_texts
from pipelib.tokens.unit_file import UnitCounts, check_unit, read_documents, read_tokens
from pipelib.tokens.unit_store import Share
from pipelib.tokens.units import Unit, encode_unit, plan_units
from pipelib.vocabulary.engines import HARD_STRINGS, GigatokenEngine, Texts, TiktokenEngine
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import PATTERNS

RUNS = 10 * int(os.environ.get("PIPELIB_TEST_RUNS", "5"))


@pytest.fixture(scope="module", autouse=True)
def state(vocabulary_root: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELIB_STATE_DIR", str(vocabulary_root))
        yield


def unit_of(path: Path) -> Unit:
    """A whole file as one unit."""
    metadata = pq.ParquetFile(path).metadata
    return Unit(path, sha256_file(path), 0, metadata.num_row_groups, metadata.num_rows, 0)


def write_texts(
    path: Path, texts: list[str | None], row_group_rows: int = 1000, kind: pa.DataType | None = None
) -> Unit:
    pq.write_table(pa.table({"text": pa.array(texts, kind or pa.string())}), path, row_group_size=row_group_rows)
    return unit_of(path)


def strings(unit: Unit) -> list[str]:
    batches = read_texts(unit.path, unit.first_group, unit.end_group, unit.rows)
    return [text for batch in batches for text in batch]


# ---- The plan --------------------------------------------------------------------------------------------------------

TEXTS = make_texts(400)


def plan(tmp_path: Path, rows: int | None = None) -> list[Unit]:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:300], [], TEXTS[300:]], row_group_rows=20)
    files = read_raw_manifest(raw).files
    if rows is not None:
        files = (replace(files[0], rows=rows),)
    return plan_units(raw, RawManifest({}, files))


def test_units_cover_every_row_once_and_in_order(tmp_path: Path) -> None:
    units = plan(tmp_path)
    assert [text for unit in units for text in strings(unit)] == TEXTS
    assert len({unit.file(tmp_path) for unit in units}) == len(units) > 16


def test_units_of_a_file_stay_the_same_when_others_come(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:300], TEXTS[300:]], row_group_rows=20)
    files = read_raw_manifest(raw).files
    both = plan_units(raw, RawManifest({}, files))
    assert both == plan_units(raw, RawManifest({}, files[:1])) + plan_units(raw, RawManifest({}, files[1:]))


@pytest.mark.parametrize("rows", [1, 19, 20, 21, 150, 299, 300])
def test_a_corpus_that_ends_within_a_file(tmp_path: Path, rows: int) -> None:
    assert [text for unit in plan(tmp_path, rows) for text in strings(unit)] == TEXTS[:rows]


def test_whole_units_are_kept_when_the_corpus_ends_later(tmp_path: Path) -> None:
    short, long = plan(tmp_path / "a", 150), plan(tmp_path / "b", 300)
    store = tmp_path / "store"
    assert [unit.file(store) for unit in short[:-1]] == [unit.file(store) for unit in long[: len(short) - 1]]


def test_large_files_are_cut_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 5000)
    units = plan(tmp_path)
    assert len(units) == 20  # a row group has more than that
    monkeypatch.setattr(module, "UNIT_BYTES", 50_000)
    monkeypatch.setattr(module, "MIN_UNITS", 1)
    assert max(unit.end_group - unit.first_group for unit in plan(tmp_path)) > 1


def test_a_file_with_fewer_rows_than_its_manifest_says(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"000_00000\.parquet .*300 rows where the manifest says 301.*--repair"):
        plan(tmp_path, 301)


@pytest.mark.parametrize("kind", [pa.int64(), pa.bool_(), pa.list_(pa.string())])
def test_a_column_that_holds_no_strings(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([None], kind)}), path)
    with pytest.raises(UserError, match=r"a\.parquet: the column `text` holds .*, not strings, so there is nothing to"):
        plan_units(tmp_path, RawManifest({}, (RawFile("a.parquet", 1, 1, "0" * 64),)))


@pytest.mark.parametrize("text", ["", "1", "1/", "/2", "2/2", "3/2", "-1/2", "a/b", "1/2/3", "0/0", "1.0/2"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UserError, match=r"is not i/n with i from 0 to n - 1"):
        Share.parse(text)


def test_shares_take_every_unit_once(tmp_path: Path) -> None:
    units = plan(tmp_path)
    dealt = [unit for index in range(3) for unit in Share.parse(f"{index}/3").of(units)]
    assert sorted(units, key=str) == sorted(dealt, key=str)


# ---- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_null_and_empty_rows_make_no_document(tmp_path: Path, kind: pa.DataType) -> None:
    unit = write_texts(tmp_path / "a.parquet", [None, "", "a", None, "bé", "", None], kind=kind)
    assert strings(unit) == ["a", "bé"]
    counts, _ = encode_unit(unit, TiktokenEngine(GPT2_TOKENIZER), tmp_path / "unit")
    assert counts == UnitCounts(tokens=5, documents=2, empty_documents=5, text_bytes=4)


def test_a_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    rows = [b"good", b"\xc3\xa9", b"bad \xff", b"\xff"]
    array = pa.Array.from_buffers(pa.string(), 4, pa.array(rows, pa.binary()).buffers())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(UserError, match=r"a\.parquet, row 3: the text is not UTF-8"):
        strings(unit_of(tmp_path / "a.parquet"))


def test_a_damaged_page_is_named_with_its_row(tmp_path: Path) -> None:
    unit = write_texts(tmp_path / "a.parquet", make_texts(100), row_group_rows=50)
    start = pq.ParquetFile(unit.path).metadata.row_group(1).column(0).dictionary_page_offset
    content = unit.path.read_bytes()
    unit.path.write_bytes(content[:start] + bytes(20) + content[start + 20 :])
    with pytest.raises(UserError, match=r"a\.parquet .*from row 51 on.*pipelib verify data/raw --repair"):
        strings(unit)


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "b", "a"]).dictionary_encode(),
        pa.array(["a", None, "b", "a"], pa.string_view()),
        pa.array(["a", None, "b", "a"], pa.large_string()),
    ],
)
def test_other_kinds_of_strings_are_text_too(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"before": [[1]] * 4, "text": column}), tmp_path / "a.parquet")
    (unit,) = plan_units(tmp_path, RawManifest({}, (RawFile("a.parquet", 1, 4, "0" * 64),)))
    assert strings(unit) == ["a", "b", "a"]


def test_a_file_of_nothing_but_nulls_has_no_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    (unit,) = plan_units(tmp_path, RawManifest({}, (RawFile("a.parquet", 1, 3, "0" * 64),)))
    assert encode_unit(unit, TiktokenEngine(GPT2_TOKENIZER), tmp_path / "unit")[0] == UnitCounts(empty_documents=3)


def test_two_columns_of_text(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has 2 columns `text`, so it is not clear which is meant"):
        plan_units(tmp_path, RawManifest({}, (RawFile("a.parquet", 1, 1, "0" * 64),)))


def test_a_column_that_ends_early_makes_no_empty_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = write_texts(tmp_path / "a.parquet", make_texts(40), row_group_rows=10)
    columns = texts_module._columns
    monkeypatch.setattr(texts_module, "_columns", lambda *arguments: list(columns(*arguments))[:-1])
    with pytest.raises(UserError, match=r"it ends before row 31, 10 rows early"):
        strings(unit)


# ---- Pieces ----------------------------------------------------------------------------------------------------------

alphabet = st.sampled_from(
    [*"ab Z19'.,!-_\n\t\r\v\f\x1c\x7f", "  ", "'s", "'ll", "'1s", "é", "日", "，", "\u00a0", "\u0085", "\u2028",
     "\u3000", "\u200b", "e\u0301", "٣", "½", "👍🏽", "<|endoftext|>"]
)  # fmt: skip
documents = st.lists(st.lists(alphabet, min_size=1, max_size=60).map("".join), min_size=1, max_size=5)


@settings(max_examples=20 * RUNS, deadline=None, database=None)
@given(texts=documents, piece=st.integers(1, 12), chunk=st.integers(1, 40), rule=st.sampled_from(sorted(PATTERNS)))
@example(texts=["a's b's 'll \n\n x"], piece=1, chunk=1, rule="gpt2")
@example(texts=[text for text in HARD_STRINGS if text], piece=5, chunk=100, rule="gpt2")
@example(texts=["a;\n\nb 日，\n，\r\n x1\n"], piece=1, chunk=10, rule="gpt4")
def test_pieces_change_no_token(texts: list[str], piece: int, chunk: int, rule: str) -> None:
    encoding = replace(GPT2_TOKENIZER, pre_tokenizer=rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts_module, "PIECE_BYTES", piece)
        patch.setattr(texts_module, "CHUNK_BYTES", chunk)
        parts = list(chunks(Texts.of(texts), rule))
    assert "".join(text for part in parts for text in part.texts) == "".join(texts)
    tokens: list[list[int]] = []
    for part in parts:
        for text, document, leads in zip(part.texts, part.document, part.leads, strict=True):
            if leads:
                tokens.append([])
            assert len(tokens) == document + 1
            tokens[-1] += encoding.encode(text)
    assert tokens == [encoding.encode(text) for text in texts]


def test_a_long_document_comes_in_pieces_and_a_word_without_end_in_one() -> None:
    text = "word " * 500_000
    pieces = [text for part in chunks(Texts.of([text]), "gpt2") for text in part.texts]
    assert max(map(len, pieces)) < 1.1 * texts_module.PIECE_BYTES
    assert len(pieces) == 3
    (part,) = chunks(Texts.of(["x" * 2_500_000]), "gpt2")
    assert len(part.texts) == 1


@pytest.mark.long
def test_ten_megabytes_without_a_space(tmp_path: Path) -> None:
    """The reference takes its time for such a word too; both give the same tokens."""
    unit = write_texts(tmp_path / "a.parquet", ["one", "ab" * 5_000_000, "two"])
    counts, _ = encode_unit(unit, GigatokenEngine(GPT2_TOKENIZER), tmp_path / "unit")
    tokens = np.concatenate(list(read_tokens(tmp_path / "unit", counts, 0, counts.tokens))).tolist()
    long = GPT2_TOKENIZER.encode("ab" * 5_000_000)
    assert tokens == [
        GPT2_TOKENIZER.end_token_id,
        505,
        GPT2_TOKENIZER.end_token_id,
        *long,
        GPT2_TOKENIZER.end_token_id,
        11545,
    ]


MEMORY = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.engines import load_engine
from pipelib.tokens.units import Unit, encode_unit
from pipelib.processes import peak_memory
path, target, engine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
unit = Unit(path, "", 0, pq.ParquetFile(path).metadata.num_row_groups, pq.ParquetFile(path).metadata.num_rows, 0)
counts, _ = encode_unit(unit, load_engine(engine, GPT2_TOKENIZER), target)
print(counts.tokens, peak_memory())
"""


def repeated(text: str, size: int) -> str:
    """A text of so many bytes."""
    return (text * (size // len(text.encode()) + 1)).encode()[:size].decode("utf-8", "ignore")


ENGLISH = " ".join(make_texts(200))
LONG = {
    "English, 200 MB": ("gigatoken", lambda: ["first", repeated(ENGLISH, 200_000_000), "last"]),
    "English, 50 MB": ("gigatoken", lambda: ["first", repeated(ENGLISH, 50_000_000), "last"]),
    "English, 20 MB, by the reference": ("tiktoken", lambda: ["first", repeated(ENGLISH, 20_000_000), "last"]),
    "Chinese, 30 MB": ("gigatoken", lambda: [repeated("今天天气很好，我们去公园。\n", 30_000_000)]),
    "lines with CR LF, 20 MB": ("gigatoken", lambda: [repeated("word\r\n", 20_000_000)]),
    "digits and letters without a space, 20 MB": ("gigatoken", lambda: [repeated("a1b2c3d4e5", 20_000_000)]),
    "one text 150 times, which parquet keeps once": ("gigatoken", lambda: [repeated(ENGLISH, 900_000)] * 150),
    "short rows, then long ones": ("gigatoken", lambda: ["short"] * 50_000 + [repeated(ENGLISH, 8_000_000)] * 10),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long if kind == "English, 200 MB" else ()) for kind in LONG]
)
def test_memory_stays_below_a_gigabyte(tmp_path: Path, kind: str) -> None:
    engine, make = LONG[kind]
    texts = make()
    size = sum(len(text.encode()) for text in texts)
    write_texts(tmp_path / "a.parquet", texts, row_group_rows=10**6)
    del texts
    run = [sys.executable, "-c", MEMORY, str(tmp_path / "a.parquet"), str(tmp_path / "unit"), engine]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    tokens, memory = map(int, done.stdout.split())
    print(f"{kind}: {memory / 1e6:.0f} MB")
    assert tokens > size / 6
    assert memory < 1_000_000_000
    if kind == "English, 50 MB":  # so that one of 200 MB has room, too
        assert memory < 400_000_000


ENDLESS = """
import numpy as np
from pipelib.processes import peak_memory
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.engines import GigatokenEngine, Texts
engine, draw = GigatokenEngine(GPT2_TOKENIZER), np.random.default_rng(0)
for _ in range(25):
    words = draw.integers(97, 123, (500_000, 8), dtype=np.uint8)
    words[:, 7] = 32
    engine.encode(Texts(words.reshape(-1), np.array([0, words.size])))
print(peak_memory())
"""


@pytest.mark.long
def test_memory_stays_bounded_for_words_that_never_come_again() -> None:
    """100 MB of them would take a gigabyte."""
    done = subprocess.run([sys.executable, "-c", ENDLESS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600_000_000


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_what_a_file_holds(tmp_path: Path) -> None:
    texts = make_texts(50)
    unit = write_texts(tmp_path / "a.parquet", ["", *texts], row_group_rows=7)
    target = tmp_path / "store/unit"
    counts, _ = encode_unit(unit, GigatokenEngine(GPT2_TOKENIZER), target)
    lists = [[GPT2_TOKENIZER.end_token_id, *GPT2_TOKENIZER.encode(text)] for text in texts]
    tokens = [token for each in lists for token in each]
    assert counts == UnitCounts(len(tokens), 50, 1, sum(len(text.encode()) for text in texts))
    assert check_unit(target, unit.identity) == counts
    assert np.concatenate(list(read_tokens(target, counts, 0, counts.tokens))).tolist() == tokens
    assert np.concatenate(list(read_tokens(target, counts, 10, 25))).tolist() == tokens[10:25]
    lengths, hashes = read_documents(target, counts)
    assert lengths.tolist() == list(map(len, lists))
    assert [row.tobytes() for row in hashes] == [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_is_not_whole_or_of_another_text_is_none(tmp_path: Path) -> None:
    path = tmp_path / "unit"
    unit = write_texts(tmp_path / "a.parquet", make_texts(5))
    counts, _ = encode_unit(unit, TiktokenEngine(GPT2_TOKENIZER), path)
    assert check_unit(path, unit.identity) == counts
    for other in (replace(unit, rows=4), replace(unit, sha256="0" * 64), replace(unit, first_group=1)):
        assert check_unit(path, other.identity) is None
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content[:100], content + b"x", bytes(len(content))):
        path.write_bytes(damaged)
        assert check_unit(path, unit.identity) is None
    assert check_unit(tmp_path / "missing", unit.identity) is None
    for place in (*range(0, len(content), 37), *range(len(content) - 48, len(content))):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert check_unit(path, unit.identity) is None


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    array = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": array}), tmp_path / "a.parquet")
    with pytest.raises(UserError):
        encode_unit(unit_of(tmp_path / "a.parquet"), TiktokenEngine(GPT2_TOKENIZER), tmp_path / "store/unit")
    assert list((tmp_path / "store").iterdir()) == []
