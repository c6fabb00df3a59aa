"""Raw text on disk: order, bytes, memory, and what is said of damaged files."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelib.corpus.parquet import ROW_GROUP_ROWS, SCHEMA, describe_file, first_rows, iterate_raw, write_raw
from pipelib.corpus.raw import Document, read_raw_manifest, write_manifest
from pipelib.errors import UserError
from pipelib.files import sha256_file

DOCUMENTS = [Document(f"text {number} é", f"id{number}", score=number / 2) for number in range(2500)]


def test_documents_come_back_in_order(tmp_path: Path) -> None:
    written = write_raw(DOCUMENTS, tmp_path)
    manifest = write_manifest(tmp_path, {"kind": "test"}, written)
    assert read_raw_manifest(tmp_path) == manifest
    assert manifest.documents == 2500
    rows = list(iterate_raw(tmp_path, ("text", "id", "score", "url")))
    assert [(row["text"], row["id"], row["score"], row["url"]) for row in rows] == [
        (document.text, document.id, document.score, None) for document in DOCUMENTS
    ]
    assert written.counts["characters"] == sum(len(document.text) for document in DOCUMENTS)
    assert written.counts["text_bytes"] == written.counts["characters"] + 2500


def test_files_have_fineweb_edus_columns_and_small_row_groups(tmp_path: Path) -> None:
    write_raw(DOCUMENTS, tmp_path)
    parquet = pq.ParquetFile(tmp_path / "000_00000.parquet")
    assert parquet.schema_arrow == SCHEMA
    assert parquet.metadata.metadata is None  # neither pandas' nor Arrow's
    assert [parquet.metadata.row_group(group).num_rows for group in range(3)] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 500]
    assert parquet.metadata.row_group(0).column(0).compression == "ZSTD"
    parquet.close()


def test_a_new_file_begins_when_one_is_full(tmp_path: Path) -> None:
    written = write_raw(DOCUMENTS, tmp_path, file_bytes=15_000)
    assert [(file.name, file.rows) for file in written.files] == [
        ("000_00000.parquet", 1000),
        ("001_00000.parquet", 1000),
        ("002_00000.parquet", 500),
    ]
    write_manifest(tmp_path, {}, written)
    assert [row["text"] for row in iterate_raw(tmp_path)] == [document.text for document in DOCUMENTS]


def test_equal_documents_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_manifest(tmp_path / name, {"kind": "test"}, write_raw(iter(DOCUMENTS), tmp_path / name))
    for name in ("000_00000.parquet", "manifest.json"):
        assert sha256_file(tmp_path / "a" / name) == sha256_file(tmp_path / "b" / name)


def test_long_documents_end_a_row_group(tmp_path: Path) -> None:
    write_raw([Document("x" * (9 << 20)) for _ in range(4)], tmp_path)
    with pq.ParquetFile(tmp_path / "000_00000.parquet") as parquet:
        assert parquet.num_row_groups == 2


def test_no_document_makes_no_file(tmp_path: Path) -> None:
    assert write_raw([], tmp_path).files == ()


def test_damage_is_named(tmp_path: Path) -> None:
    written = write_raw(DOCUMENTS, tmp_path)
    write_manifest(tmp_path, {}, written)
    path = tmp_path / "000_00000.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    with pytest.raises(
        UserError, match=r"000_00000\.parquet cannot be read as parquet.*`pipelib verify data/raw --repair`"
    ):
        list(iterate_raw(tmp_path))
    path.write_bytes(content[:200] + bytes(100) + content[300:])
    with pytest.raises(UserError, match=r"row group 0.*`pipelib verify data/raw --repair`"):
        list(iterate_raw(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        list(iterate_raw(tmp_path))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a manifest.*`pipelib verify data/raw --repair`"):
        read_raw_manifest(tmp_path)


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"no column `text` \(it has body\)"):
        describe_file(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(1, (1, 2)), (2, (1, 2)), (3, (2, 9)), (9, (2, 9)), (10, (3, 12)), (17, (5, 17)), (99, (5, 17))],
)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_document_counts_its_token_count_else_a_token_for_four_bytes(
    tmp_path: Path, rows: int, max_tokens: int, expected: tuple[int, int]
) -> None:
    columns = {"text": ["ééé", "x", "x" * 9, "", "x" * 17], "token_count": [2, 7, None, 0, None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=rows)
    assert first_rows(tmp_path / "a.parquet", max_tokens) == expected
    del columns["token_count"]
    pq.write_table(pa.table(columns), tmp_path / "b.parquet", row_group_size=rows)
    assert first_rows(tmp_path / "b.parquet", 99) == (5, 2 + 1 + 3 + 0 + 5)


def test_the_manifest_says_how_many_rows_of_a_file_belong_to_the_corpus(tmp_path: Path) -> None:
    written = write_raw(DOCUMENTS, tmp_path)
    write_manifest(tmp_path, {}, replace(written, files=(replace(written.files[0], rows=1001),)))
    assert [row["text"] for row in iterate_raw(tmp_path)] == [document.text for document in DOCUMENTS[:1001]]
    assert read_raw_manifest(tmp_path).documents == 1001


@pytest.mark.parametrize(
    ("counts", "rows"),
    [
        (pa.array([2, 2, 2, 2]), 2),
        (pa.array([2, None, 2, 2]), 3),  # "bbbb" counts one
        (pa.array([-5, 1, 2, 2]), 3),  # "aaaaaaaa" counts two
        (pa.array([2.0, float("nan"), 2.0, 2.0]), 3),  # no whole numbers: two, one, one
        (pa.array(["2", "2", "2", "2"]), 3),
    ],
)
def test_a_token_count_that_is_none_is_estimated(tmp_path: Path, counts: pa.Array, rows: int) -> None:
    texts = ["aaaaaaaa", "bbbb", "cccc", "dddd"]
    pq.write_table(pa.table({"text": texts, "token_count": counts}), tmp_path / "a.parquet")
    assert first_rows(tmp_path / "a.parquet", 4)[0] == rows
