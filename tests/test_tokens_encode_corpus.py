"""The same shards for any number of workers, either engine, and any kill; and a clear word about what cannot be read."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import make_texts, write_raw_files
from test_tokens_shards import read_as_llm_c

from pipelib.errors import UserError
from pipelib.files import files_under, read_json, sha256_file
from pipelib.model.vocabulary import EOT_TOKEN_ID
from pipelib.stage import Build
from pipelib.tokens import encode_corpus as module
from pipelib.tokens.encode_corpus import Unit, encode_corpus, encode_units, plan_units, read_documents
from pipelib.tokens.encoding import VOCABULARY_SHA256, tiktoken_encoding
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.shards import UNIGRAM_COUNTS, read_manifest, shard_problems
from pipelib.tracking import NullRun

SHARD_TOKENS = 100_000


@pytest.fixture(scope="module", autouse=True)
def state(vocabulary_root: Path) -> Iterator[None]:
    """The vocabulary is laid out once, and a unit is small enough for a few megabytes to make many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELIB_STATE_DIR", str(vocabulary_root))
        patch.setattr(module, "UNIT_BYTES", 250_000)
        yield


def build_in(folder: Path) -> Build:
    for name in ("outs", "work"):
        (folder / name).mkdir(parents=True)
    return Build(folder / "outs", folder / "work", NullRun(), {}, False)


def run(raw: Path, build: Build, shard_tokens: int = SHARD_TOKENS, benchmark_documents: int = 0) -> Any:
    return encode_corpus(build, raw, TokenizeParams(shard_tokens), benchmark_documents)


# ---- What it makes ---------------------------------------------------------------------------------------------------

TEXTS = make_texts(6000)
FILES = [TEXTS[:1500], [], TEXTS[1500:1501], [None, *TEXTS[1501:4000], "", None], TEXTS[4000:]]
"""3 MB in files of every length, with rows that hold no text."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw_files(tmp_path_factory.mktemp("raw"), FILES, row_group_rows=200)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, raw: Path, state: None) -> tuple[Path, Any, Any]:  # noqa: ARG001
    """data/tokens, the result and the speed of a plain run."""
    build = build_in(tmp_path_factory.mktemp("made"))
    result, speed = run(raw, build)
    return build.outs / "data/tokens", result, speed


@pytest.fixture(scope="module")
def expected(state: None) -> list[int]:  # noqa: ARG001
    """The whole corpus as tiktoken encodes it, each document led by <|endoftext|>."""
    encoding = tiktoken_encoding()
    return [token for text in TEXTS for token in (EOT_TOKEN_ID, *encoding.encode_ordinary(text))]


def test_the_corpus_has_many_units_of_several_row_groups(raw: Path) -> None:
    units = plan_units([raw / file["name"] for file in read_json(raw / "manifest.json")["files"]])
    assert len(units) > 8
    assert max(len(unit.row_groups) for unit in units) > 1
    assert [unit.index for unit in units] == list(range(len(units)))


def test_shards_hold_the_tokens_of_every_document(made: tuple[Path, Any, Any], expected: list[int]) -> None:
    folder, _, _ = made
    manifest = read_manifest(folder)
    assert [token for shard in manifest.shards for token in read_as_llm_c(folder / shard.name)] == expected
    assert {shard.tokens for shard in manifest.shards[:-1]} == {SHARD_TOKENS}
    assert len(manifest.shards) > 3
    assert manifest.shards[0].name == "val_000000.bin"
    assert all(shard_problems(folder, shard) == [] for shard in manifest.shards)


def test_a_document_is_split_where_a_shard_ends(made: tuple[Path, Any, Any], expected: list[int]) -> None:
    folder, _, _ = made
    assert any(expected[end] != EOT_TOKEN_ID for end in range(SHARD_TOKENS, len(expected), SHARD_TOKENS)), (
        "the corpus proves nothing"
    )
    manifest = read_manifest(folder)
    assert sum(shard.documents for shard in manifest.shards) == len(TEXTS)


def test_manifest_counts_and_metrics(made: tuple[Path, Any, Any], expected: list[int]) -> None:
    folder, result, speed = made
    manifest = read_manifest(folder)
    assert manifest.encoding == {"name": "gpt2", "vocabulary_sha256": VOCABULARY_SHA256}
    assert manifest.source == {"kind": "test"}
    counts = np.load(folder / UNIGRAM_COUNTS)
    assert np.array_equal(counts, np.bincount(expected[SHARD_TOKENS:], minlength=len(counts)))
    text_bytes = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert result == {
        "tokens": len(expected),
        "train_tokens": len(expected) - SHARD_TOKENS,
        "val_tokens": SHARD_TOKENS,
        "documents": len(TEXTS),
        "empty_documents": 3,
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / (len(expected) - len(TEXTS)), 4),
        "shards": len(manifest.shards),
    }
    assert speed["engine"] == "gigatoken"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", UNIGRAM_COUNTS, *(shard.name for shard in manifest.shards)]
    )


@pytest.mark.parametrize(("engine", "workers"), [("gigatoken", 1), ("gigatoken", 4), ("tiktoken", 1), ("tiktoken", 2)])
def test_shards_are_the_same_for_any_workers_and_engine(
    tmp_path: Path, raw: Path, made: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, engine: str, workers: int
) -> None:
    monkeypatch.setenv("PIPELIB_TOKENIZER", engine)
    monkeypatch.setenv("PIPELIB_WORKERS", str(workers))
    build = build_in(tmp_path)
    result, speed = run(raw, build)
    assert (speed["engine"], speed["workers"]) == (engine, workers)
    assert result == made[1]
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in files_under(folder)}


def test_units_do_not_decide_the_shards(
    tmp_path: Path, raw: Path, made: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 8 << 20)
    build = build_in(tmp_path)
    run(raw, build)
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


def test_more_training_text_leaves_the_validation_shard_as_it_is(tmp_path: Path, made: tuple[Path, Any, Any]) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:3000]])
    build = build_in(tmp_path / "build")
    run(raw, build)
    assert sha256_file(build.outs / "data/tokens/val_000000.bin") == sha256_file(made[0] / "val_000000.bin")


# ---- Kills -----------------------------------------------------------------------------------------------------------


class Deadly(Unit):
    """A unit whose worker is killed between its encoding and its first byte on disk."""

    def tokens_file(self, folder: Path) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)
        return folder


def test_a_killed_worker_is_one_message_and_finished_units_are_kept(
    tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]
) -> None:
    units = plan_units([raw / file["name"] for file in read_json(raw / "manifest.json")["files"]])
    build = build_in(tmp_path)
    folder = build.work / "units"
    folder.mkdir()
    deadly = Deadly(units[5].index, units[5].path, units[5].row_groups)
    with pytest.raises(UserError, match=r"a worker was killed.*what it finished is kept.*PIPELIB_WORKERS=1"):
        encode_units([*units[:5], deadly, *units[6:]], folder, "gigatoken", workers=1)
    finished = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(path.name for path in finished if path.suffix == ".json") == [f"{n:06d}.json" for n in range(5)]
    result, _ = run(raw, build)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished units were made again"
    assert result == made[1]
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


def test_tokens_without_their_marker_are_made_again(tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]) -> None:
    build = build_in(tmp_path)
    (build.work / "units").mkdir()
    (build.work / "units/000000.tokens").write_bytes(b"half of it")
    run(raw, build)
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


# ---- Bad input -------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, raw: Path, message: str, **options: int) -> None:
    build = build_in(tmp_path / "build")
    with pytest.raises(UserError, match=message):
        run(raw, build, **options)
    assert not (build.outs / "data/tokens/manifest.json").exists()


@pytest.mark.parametrize("files", [[], [[]], [[None, ""], [""]]])
def test_no_text(tmp_path: Path, files: list[list[str | None]]) -> None:
    refused(tmp_path, write_raw_files(tmp_path / "raw", files), "holds no text .*so there is nothing to learn")


def test_a_validation_shard_that_takes_everything(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:10]])
    refused(tmp_path, raw, r"takes tokenize\.shard_tokens = 100000, so no training data is left; lower")


def test_benchmarks_out_of_training_text(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [["one two three " * 500] * 10])
    words = (
        r"only the first 2 documents lie wholly in the validation shard of 4000 tokens.*raise tokenize\.shard_tokens"
    )
    refused(tmp_path, raw, words, shard_tokens=4000, benchmark_documents=3)


def test_as_many_benchmark_documents_as_lie_in_the_validation_shard(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [["one two three " * 500] * 10])
    run(raw, build_in(tmp_path / "build"), shard_tokens=4000, benchmark_documents=2)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.chmod(0o644)
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "a page overwritten":
        path.write_bytes(content[:200] + bytes(2000) + content[2200:])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"001_00000\.parquet is missing, though the manifest beside it names it"),
        ("empty", r"001_00000\.parquet is not a readable parquet file"),
        ("cut short", r"001_00000\.parquet is not a readable parquet file .*pipelib verify data/raw --repair"),
        ("a page overwritten", r"001_00000\.parquet, row groups 0 to 1: .*the file is damaged"),
    ],
)
def test_a_damaged_parquet_file_is_named(tmp_path: Path, how: str, message: str) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:100], TEXTS[100:200]], row_group_rows=50)
    damage(raw / "001_00000.parquet", how)
    refused(tmp_path, raw, message)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"body": ["x"], "id": ["y"]}), "has the columns body, id and no `text`"),
        (pa.table({"text": [1, 2]}), "the `text` column holds int, not text"),
        (pa.table({"text": [b"x"]}), "the `text` column holds bytes, not text"),
        (pa.table({"text": pa.array([b"\xff"], pa.binary()).view(pa.string())}), "(?i)row groups 0 to 0: .*utf-?8"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    raw = write_raw_files(tmp_path / "raw", [["x"]])
    pq.write_table(table, raw / "000_00000.parquet")
    refused(tmp_path, raw, message)


def test_large_strings_are_text_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["x", None], pa.large_string())}), tmp_path / "a.parquet")
    assert read_documents(Unit(0, tmp_path / "a.parquet", (0,))) == (["x"], 1)


def test_too_little_space_is_said_first(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, needed: int, what: str) -> None:
        raise UserError(f"{what} needs {needed} in {folder}")

    monkeypatch.setattr(module, "require_free_space", full)
    refused(tmp_path, raw, "tokenization needs")


@pytest.mark.parametrize("wish", ["0", "x", "-1", "1.5"])
def test_a_wrong_number_of_workers_is_refused(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    monkeypatch.setenv("PIPELIB_WORKERS", wish)
    refused(tmp_path, raw, f"PIPELIB_WORKERS={wish} is not a whole number from 1 on")
