"""The same shards for any number of workers, either engine, and any kill; and a clear word about what cannot be read."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import make_texts, write_raw_files
from small_project import hold
from small_vocabulary import FOLDER, TOKENIZER
from test_tokens_shards import read_as_llm_c
from warm_pool import fork_workers

from pipelib.errors import UserError
from pipelib.files import files_under, sha256_file, sha256_json, write_json
from pipelib.stage import Build
from pipelib.tokens import encode_corpus as module
from pipelib.tokens import units as units_module
from pipelib.tokens.dedup import find_duplicates
from pipelib.tokens.encode_corpus import DoneUnit, Part, cut_parts, encode_corpus, encode_share
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.shards import UNIGRAM_COUNTS, read_manifest, shard_problems
from pipelib.tokens.unit_store import Share
from pipelib.tokens.units import Unit, encode_unit
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.choice import Vocabulary
from pipelib.vocabulary.engines import TiktokenEngine
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import state_root

SHARD_TOKENS = 100_000
RUNS = int(os.environ.get("PIPELIB_TEST_RUNS", "3"))
SEED = int(os.environ.get("PIPELIB_TEST_SEED", random.randrange(10**6)))


@pytest.fixture(scope="module", autouse=True)
def state(vocabulary_root: Path) -> Iterator[None]:
    """The vocabulary is laid out once. Workers are forks of a process with its imports done, one unless a test asks for more.

    Tests of kills start their own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIPELIB_STATE_DIR", str(vocabulary_root))
        patch.setenv("PIPELIB_WORKERS", "1")
        fork_workers(patch)
        yield


def build_in(folder: Path) -> Build:
    """A build whose code nobody else has, so that it finds no units of others."""
    for name in ("outs", "work"):
        (folder / name).mkdir(parents=True)
    return Build(folder / "outs", folder / "work", NullRun(), {"folder": str(folder)}, False)


def run(
    raw: Path,
    build: Build,
    shard_tokens: Any = SHARD_TOKENS,
    benchmark_documents: int = 0,
    dedup: Any = "none",
    tokenizer: Tokenizer = TOKENIZER,
) -> Any:
    params = TokenizeParams(shard_tokens, dedup)
    return encode_corpus(build, raw, params, benchmark_documents, Vocabulary(tokenizer, None))


# ---- What it makes ---------------------------------------------------------------------------------------------------

TEXTS = make_texts(6000)
FILES = [TEXTS[:1500], [], TEXTS[1500:1501], [None, *TEXTS[1501:4000], "", None], TEXTS[4000:]]
"""3 MB in files of every length, with rows that hold no text."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_raw_files(tmp_path_factory.mktemp("raw"), FILES, row_group_rows=100)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, raw: Path, state: None) -> tuple[Path, Any, Any]:  # noqa: ARG001
    """data/tokens, the result and the speed of a plain run."""
    build = build_in(tmp_path_factory.mktemp("made"))
    result, speed = run(raw, build)
    return build.outs / "data/tokens", result, speed


@pytest.fixture(scope="module")
def expected(state: None) -> list[int]:  # noqa: ARG001
    return as_tiktoken_does(TOKENIZER, TEXTS)


def as_tiktoken_does(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """The tokens of a corpus, each document led by the end token."""
    return [token for text in texts for token in (tokenizer.end_token_id, *tokenizer.encode(text))]


def test_shards_hold_the_tokens_of_every_document(made: tuple[Path, Any, Any], expected: list[int]) -> None:
    folder, _, _ = made
    manifest = read_manifest(folder)
    assert [token for shard in manifest.shards for token in read_as_llm_c(folder / shard.name)] == expected
    assert {shard.tokens for shard in manifest.shards[:-1]} == {SHARD_TOKENS}
    assert len(manifest.shards) > 3
    assert manifest.shards[0].name == "val_000000.bin"
    assert all(shard_problems(folder, shard, TOKENIZER) == [] for shard in manifest.shards)


def test_with_gpt2s_vocabulary_they_hold_what_tiktoken_gives(tmp_path: Path) -> None:
    build = build_in(tmp_path)
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:1000]], row_group_rows=100)
    run(raw, build, tokenizer=GPT2_TOKENIZER)
    folder = build.outs / "data/tokens"
    tokens = [token for shard in read_manifest(folder).shards for token in read_as_llm_c(folder / shard.name)]
    assert tokens == as_tiktoken_does(GPT2_TOKENIZER, TEXTS[:1000])


def test_a_document_is_split_where_a_shard_ends(made: tuple[Path, Any, Any], expected: list[int]) -> None:
    folder, _, _ = made
    assert any(expected[end] != TOKENIZER.end_token_id for end in range(SHARD_TOKENS, len(expected), SHARD_TOKENS)), (
        "the corpus proves nothing"
    )
    manifest = read_manifest(folder)
    assert sum(shard.documents for shard in manifest.shards) == len(TEXTS)


def test_manifest_counts_and_metrics(made: tuple[Path, Any, Any], expected: list[int]) -> None:
    folder, result, speed = made
    manifest = read_manifest(folder)
    assert manifest.encoding == {"name": TOKENIZER.name, "vocabulary_sha256": TOKENIZER.fingerprint}
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
        "shard_tokens": SHARD_TOKENS,
    }
    assert speed["engine"] == "gigatoken"
    assert speed["units"] == speed["units_encoded"] > 8
    assert 50_000_000 < speed["worker_peak_bytes"] < 1_000_000_000
    assert list(speed["worker_seconds"]) == ["verify", "read", "encode", "join", "write", "check", "shards"]
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
    monkeypatch.setattr(units_module, "MIN_UNITS", 1)
    build = build_in(tmp_path)
    _, speed = run(raw, build)
    assert speed["units"] == len(list(filter(None, FILES)))
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


def test_more_training_text_leaves_the_validation_shard_as_it_is(tmp_path: Path, made: tuple[Path, Any, Any]) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:3000]])
    build = build_in(tmp_path / "build")
    run(raw, build)
    assert sha256_file(build.outs / "data/tokens/val_000000.bin") == sha256_file(made[0] / "val_000000.bin")


# ---- What is kept ----------------------------------------------------------------------------------------------------


def test_a_longer_corpus_encodes_only_what_is_new(tmp_path: Path, made: tuple[Path, Any, Any], raw: Path) -> None:
    build = build_in(tmp_path / "build")
    short = write_raw_files(tmp_path / "raw", FILES[:4], row_group_rows=100)
    run(short, build)
    before = hashes(build.outs / "data/tokens")
    result, speed = run(raw, build)
    assert result == made[1]
    after = hashes(build.outs / "data/tokens")
    assert after == hashes(made[0])
    assert speed["units_encoded"] == 20  # of the last file's 2,000 rows in groups of 100
    assert speed["units"] > 40
    *full, _ = sorted(name for name in before if name.startswith("train_"))
    assert len(full) == 5
    assert [after[name] for name in full] == [before[name] for name in full]
    assert after["val_000000.bin"] == before["val_000000.bin"]


def test_other_shards_of_the_same_text_encode_nothing(tmp_path: Path, raw: Path) -> None:
    build = build_in(tmp_path)
    run(raw, build)
    result, speed = run(raw, build, shard_tokens=50_000, dedup="exact")
    assert speed["units_encoded"] == 0
    assert sum(speed["worker_seconds"][step] for step in ("verify", "read", "encode", "join", "write")) == 0
    assert result["val_tokens"] == 50_000


def test_a_damaged_unit_is_encoded_again(tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]) -> None:
    build = build_in(tmp_path)
    run(raw, build)
    unit = sorted(units_of(build.code).rglob("*.unit"))[3]
    content = unit.read_bytes()
    unit.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    _, speed = run(raw, build)
    assert speed["units_encoded"] == 1
    assert hashes(build.outs / "data/tokens") == hashes(made[0])
    assert unit.read_bytes() == content


def test_a_unit_that_changes_between_its_encoding_and_its_use(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = build_in(tmp_path)
    write_shards = module.write_shards

    def damage_first(*arguments: Any) -> Any:
        unit = sorted(units_of(build.code).rglob("*.unit"))[2]
        content = unit.read_bytes()
        unit.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        return write_shards(*arguments)

    monkeypatch.setattr(module, "write_shards", damage_first)
    with pytest.raises(UserError, match=r"\.unit changed since it was written, .*it was removed: run dvc repro again"):
        run(raw, build)
    assert not (build.outs / "data/tokens/manifest.json").exists()
    monkeypatch.setattr(module, "write_shards", write_shards)
    _, speed = run(raw, build)
    assert speed["units_encoded"] == 1


def units_of(code: Mapping[str, str]) -> Path:
    """The folder of units that a run with this code uses."""
    return state_root() / "units" / sha256_json({**code, "vocabulary": TOKENIZER.fingerprint})[:16]


def test_two_units_that_were_swapped_are_encoded_again(tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]) -> None:
    build = build_in(tmp_path)
    run(raw, build)
    first, second = sorted(units_of(build.code).rglob("*.unit"))[:2]
    first.rename(tmp_path / "third")
    second.rename(first)
    (tmp_path / "third").rename(second)
    _, speed = run(raw, build)
    assert speed["units_encoded"] == 2
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


def test_what_killed_processes_leave_is_removed(tmp_path: Path, raw: Path) -> None:
    build = build_in(tmp_path)
    leftover = units_of(build.code) / "abc/.000000-000001-100.unit.0123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    share = hold(units_of(build.code), "lock-0-of-2")
    run(raw, build)
    assert leftover.exists(), "a share may be writing it"
    share.close()
    run(raw, build)
    assert not leftover.exists()


# ---- Shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_shares_in_several_processes_give_the_same_shards(
    tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]
) -> None:
    build = build_in(tmp_path)
    counts = [encode_share(build.code, raw, Share(index, 3), TOKENIZER) for index in range(3)]
    assert max(counts) - min(counts) <= 1
    result, speed = run(raw, build)
    assert speed["units_encoded"] == 0
    assert speed["units"] == sum(counts)
    assert result == made[1]
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


def test_a_missing_share_is_made_by_the_stage(tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]) -> None:
    build = build_in(tmp_path)
    encode_share(build.code, raw, Share(1, 2), TOKENIZER)
    _, speed = run(raw, build)
    assert 0 < speed["units_encoded"] < speed["units"]
    assert hashes(build.outs / "data/tokens") == hashes(made[0])


# ---- De-duplication --------------------------------------------------------------------------------------------------


@settings(max_examples=20 * RUNS, deadline=None, database=None)
@given(documents=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=40), cuts=st.integers(1, 5))
def test_duplicates_are_those_that_occurred_before(documents: list[tuple[int, int]], cuts: int) -> None:
    hashes_of = np.array(documents, np.uint64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelib.tokens.dedup._BLOCK", 7)
        found = find_duplicates(np.array_split(hashes_of, cuts), len(documents))
    assert found.tolist() == [pair in documents[:index] for index, pair in enumerate(documents)]


DEDUP_MEMORY = """
import numpy as np
from pipelib.tokens.dedup import find_duplicates
from pipelib.processes import peak_memory
draw = np.random.default_rng(0)
def parts():
    for _ in range(40):
        yield draw.integers(0, 1 << 40, (100_000, 2), dtype=np.uint64)
find_duplicates([np.zeros((10, 2), np.uint64)], 10)
before = peak_memory()
find_duplicates(parts(), 4_000_000)
print((peak_memory() - before) / 4_000_000)
"""


def test_deduplication_takes_at_most_32_bytes_a_document() -> None:
    done = subprocess.run([sys.executable, "-c", DEDUP_MEMORY], capture_output=True, text=True, check=True)
    assert 20 < float(done.stdout) <= 32


REPEATED = ["a b c", "d", "a b c", "e f", "d", "g " * 30, "a b c", "h"]


def test_the_first_of_equal_documents_stays(tmp_path: Path) -> None:
    texts = [f"{text} {number}" for number in range(2000) for text in REPEATED]
    texts[5000:5000] = texts[:300]
    distinct = list(dict.fromkeys(texts))
    raw = write_raw_files(tmp_path / "raw", [texts[:5100], texts[5100:]], row_group_rows=100)
    plain = write_raw_files(tmp_path / "plain", [distinct], row_group_rows=100)
    ours, expected = build_in(tmp_path / "a"), build_in(tmp_path / "b")
    result, _ = run(raw, ours, shard_tokens=10_000, dedup="exact")
    run(plain, expected, shard_tokens=10_000)
    shards = [name for name in hashes(ours.outs / "data/tokens") if name.endswith(".bin")]
    assert len(shards) > 5
    assert {name: sha for name, sha in hashes(ours.outs / "data/tokens").items() if name in shards} == {
        name: sha for name, sha in hashes(expected.outs / "data/tokens").items() if name.endswith(".bin")
    }
    assert result["documents"] == len(distinct)
    assert result["duplicate_documents"] == len(texts) - len(distinct)
    manifest = read_manifest(ours.outs / "data/tokens")
    assert manifest.dedup == {"method": "exact", "dropped_documents": len(texts) - len(distinct)}
    assert read_manifest(expected.outs / "data/tokens").dedup is None


@settings(max_examples=10 * RUNS, deadline=None, database=None)
@given(data=st.data(), shard_tokens=st.integers(1, 60))
def test_parts_are_cut_exactly(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    engine = TiktokenEngine(TOKENIZER)
    parts: list[Part] = []
    expected: list[int] = []
    for number in range(data.draw(st.integers(0, 3))):
        texts = data.draw(st.lists(st.sampled_from(["a", "b c d", "naïve", "1 2 3 4"]), min_size=1, max_size=8))
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
        path = folder / f"{number}.unit"
        unit = Unit(folder / "a.parquet", "", 0, 1, len(texts), 0)
        counts, seconds = encode_unit(unit, engine, path)
        done = DoneUnit(path, unit.identity, counts, seconds)
        dropped = sorted(data.draw(st.sets(st.integers(0, len(texts) - 1))))
        lists = [[TOKENIZER.end_token_id, *TOKENIZER.encode(text)] for text in texts]
        parts.append(Part(done, np.array(dropped, np.uint32), sum(len(lists[index]) for index in dropped)))
        kept = np.array([len(tokens) for index, tokens in enumerate(lists) if index not in dropped], np.int64)
        assert parts[-1].starts().tolist() == (np.cumsum(kept) - kept).tolist()
        expected += [token for index, tokens in enumerate(lists) if index not in dropped for token in tokens]
    cut = [
        [int(token) for part, start, end in spans for piece in part.read(start, end) for token in piece]
        for spans in cut_parts(parts, shard_tokens, shard_tokens)
    ]
    assert cut == [expected[start : start + shard_tokens] for start in range(0, len(expected), shard_tokens)]


# ---- Kills -----------------------------------------------------------------------------------------------------------

STAGE = """
import sys
from pathlib import Path
from pipelib.stage import Build
from pipelib.tokens.encode_corpus import encode_corpus
from pipelib.tokens.params import TokenizeParams
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.choice import Vocabulary
from pipelib.vocabulary.folder import read_tokenizer

if __name__ == "__main__":
    folder, raw, vocabulary = map(Path, sys.argv[1:])
    (folder / "outs").mkdir(exist_ok=True)
    build = Build(folder / "outs", folder / "work", NullRun(), {"folder": str(folder)}, False)
    encode_corpus(build, raw, TokenizeParams(100_000, "none"), 0, Vocabulary(read_tokenizer(vocabulary), None))
"""


@pytest.mark.random
def test_killed_at_any_instant_it_goes_on(tmp_path: Path, raw: Path, made: tuple[Path, Any, Any]) -> None:
    """The parent or a worker gets SIGKILL when a random number of units is there, or a little later; the runs after it
    redo only what was not finished."""
    script = tmp_path / "stage.py"
    script.write_text(STAGE, encoding="utf-8")
    draw = random.Random(SEED)
    partial = kills = 0

    def too_few() -> bool:
        return kills < max(2, RUNS // 4) or not partial

    while too_few():
        folder = tmp_path / f"try{kills}"
        folder.mkdir()
        store = units_of({"folder": str(folder)})
        for attempt in range(5):
            before = {path: path.stat().st_mtime_ns for path in store.rglob("*.unit")}
            command = [sys.executable, str(script), str(folder), str(raw), str(FOLDER)]
            environment = {**os.environ, "PIPELIB_WORKERS": "2"}
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            # the last attempt is left alone, and so is one after enough kills
            enough = draw.randint(len(before), made[2]["units"]) if attempt < 4 and too_few() else made[2]["units"] + 1
            while process.poll() is None and sum(1 for _ in store.rglob("*.unit")) < enough:
                time.sleep(0.001)  # for ever would take a core from the workers
            time.sleep(draw.choice([0.0, 0.0, 0.01, 0.1]))
            victim = draw.choice([process.pid, *children_of(process.pid)])
            killed = process.poll() is None
            if killed:
                os.kill(victim, signal.SIGKILL)
            _, said = process.communicate()
            after = {path: path.stat().st_mtime_ns for path in store.rglob("*.unit")}
            assert before.items() <= after.items(), "a finished unit was made again"
            partial += killed and 0 < len(after) < made[2]["units"]
            kills += killed
            if process.returncode == 0:
                break
            if victim != process.pid:
                assert "a worker was killed" in said, said
            assert killed, said
        assert hashes(folder / "outs/data/tokens") == hashes(made[0])
        assert not list(store.rglob("*.tmp"))
    print(f"seed {SEED}: {kills} kills, {partial} of them with some units there, all bytes equal")


def children_of(pid: int) -> Sequence[int]:
    """The workers of a process, by Linux's own account; not Python's resource tracker."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []


# ---- Bad input -------------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, raw: Path, message: str, **options: int) -> None:
    build = build_in(tmp_path / "build")
    with pytest.raises(UserError, match=message):
        run(raw, build, **options)
    assert not (build.outs / "data/tokens/manifest.json").exists()


@pytest.mark.parametrize("files", [[], [[]], [[None, ""], [""]]])
def test_no_text(tmp_path: Path, files: list[list[str | None]]) -> None:
    refused(tmp_path, write_raw_files(tmp_path / "raw", files), "contains no text .*so there is nothing to learn")


def test_a_validation_shard_that_takes_everything(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:10]])
    refused(tmp_path, raw, r"takes 100000, so no training data is left; lower")


def test_benchmarks_out_of_training_text(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [["one two three " * 500] * 10])
    words = (
        r"only the first 2 documents are entirely in the validation shard of 12000 tokens.*raise tokenize\.shard_tokens"
    )
    refused(tmp_path, raw, words, shard_tokens=12_000, benchmark_documents=3)


def test_as_many_benchmark_documents_as_lie_in_the_validation_shard(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [["one two three " * 500] * 10])
    run(raw, build_in(tmp_path / "build"), shard_tokens=12_000, benchmark_documents=2)


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
        ("missing", r"001_00000\.parquet does not exist, so part of the corpus is missing; run dvc repro"),
        ("empty", r"001_00000\.parquet cannot be read as parquet"),
        ("cut short", r"001_00000\.parquet cannot be read as parquet .*pipelib verify data/raw --repair"),
        (
            "a page overwritten",
            r"001_00000\.parquet has sha256 .*its bytes changed, so its text may be wrong; run `pipelib ver",
        ),
    ],
)
def test_a_damaged_parquet_file_is_named(tmp_path: Path, how: str, message: str) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:100], TEXTS[100:200]], row_group_rows=50)
    damage(raw / "001_00000.parquet", how)
    refused(tmp_path, raw, message)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"body": ["x"], "id": ["y"]}), r"has no column `text` \(it has body, id\)"),
        (pa.table({"text": [1, 2]}), "the column `text` holds int64, not strings"),
        (pa.table({"text": [True]}), "the column `text` holds bool, not strings"),
        (pa.table({"text": pa.array([b"x", b"\xff"], pa.binary()).view(pa.string())}), "row 2: the text is not UTF-8"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path: Path, table: pa.Table, message: str) -> None:
    raw = write_raw_files(tmp_path / "raw", [["x"]])
    path = raw / "000_00000.parquet"
    pq.write_table(table, path)
    line = {"name": path.name, "bytes": path.stat().st_size, "rows": len(table), "sha256": sha256_file(path)}
    write_json(raw / "manifest.json", {"source": {"kind": "test"}, "files": [line], "documents": 0})
    refused(tmp_path, raw, message)


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
    refused(tmp_path, raw, f"PIPELIB_WORKERS={wish} is not valid: it must be a whole number, 1 or more")


# ---- What the manifest of the text says ------------------------------------------------------------------------------


def rewrite_manifest(raw: Path, **more: object) -> None:
    """Change data/raw/manifest.json."""
    write_json(raw / "manifest.json", {**json.loads((raw / "manifest.json").read_text()), **more})


@pytest.mark.parametrize(
    ("tokens", "at_least", "expected"),
    [
        (2, 0, 1024), (50_000, 0, 5_000), (50_000, 7_000, 7_000), (2_560_000, 0, 256_000), (7_400_214, 0, 256_000),
        (65_536_000, 0, 256_000), (10**9, 0, 3_906_250), (10**11, 0, 10**8),
    ],
)  # fmt: skip
def test_the_size_of_a_shard_follows_the_corpus(tokens: int, at_least: int, expected: int) -> None:
    assert TokenizeParams("auto", "none").shard_size(tokens, at_least) == expected
    assert TokenizeParams(1234, "none").shard_size(tokens, at_least) == 1234


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_auto_keeps_the_documents_of_the_benchmark_in_the_validation_shard(tmp_path: Path, dedup: str) -> None:
    long, short = "one two three " * 500, ["a short document"] * 300
    raw = write_raw_files(tmp_path / "raw", [[long] * 2 + make_texts(1) + [long] * 2, short])
    result, _ = run(raw, build_in(tmp_path / "build"), "auto", 4, dedup)
    benchmark = sum(len(TOKENIZER.encode(text)) + 1 for text in ([long] if dedup == "exact" else [long] * 3))
    benchmark += len(TOKENIZER.encode(make_texts(1)[0])) + 1
    assert result["val_tokens"] == result["shard_tokens"] == benchmark


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_the_validation_split_are_the_first_documents_if_the_user_names_them(tmp_path: Path, dedup: str) -> None:
    held, more = [*make_texts(50), make_texts(1)[0]], make_texts(120, seed=1)
    shards = []
    for number, texts in enumerate((more[:90], more)):
        raw = write_raw_files(tmp_path / f"raw {number}", [[*held[:20]], [*held[20:], *texts]], row_group_rows=23)
        rewrite_manifest(raw, validation_documents=len(held))
        build = build_in(tmp_path / f"build {number}")
        result, _ = run(raw, build, 4096, len(held), dedup)
        kept = held[:50] if dedup == "exact" else held
        assert result["val_tokens"] == sum(len(TOKENIZER.encode(text)) + 1 for text in kept)
        shards.append((build.outs / "data/tokens/val_000000.bin").read_bytes())
        sizes = [shard.tokens for shard in read_manifest(build.outs / "data/tokens").split("train")]
        assert sizes[:-1] == [4096] * (len(sizes) - 1)
    assert shards[0] == shards[1]  # more text for training leaves it as it is
    rewrite_manifest(raw, validation_documents=len(held) + len(more))
    refused(tmp_path, raw, "so no training data is left", shard_tokens=4096)


def test_another_column_is_the_text(tmp_path: Path) -> None:
    plain = write_raw_files(tmp_path / "plain", [TEXTS[:200]])
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:200]])
    path = raw / "000_00000.parquet"
    pq.write_table(pa.table({"text": [1] * 200, "content": [text.encode() for text in TEXTS[:200]]}), path)
    line = {"name": path.name, "bytes": path.stat().st_size, "rows": 200, "sha256": sha256_file(path)}
    rewrite_manifest(raw, files=[line], text_column="content")
    builds = [build_in(tmp_path / name) for name in ("one", "two")]
    for build, folder in zip(builds, (plain, raw), strict=True):
        run(folder, build, 4096)
    tokens = [[path.read_bytes() for path in sorted((build.outs / "data/tokens").glob("*.bin"))] for build in builds]
    assert tokens[0] == tokens[1]


def test_texts_that_are_not_utf8_are_skipped_if_the_manifest_says_so(tmp_path: Path) -> None:
    raw = write_raw_files(tmp_path / "raw", [TEXTS[:200]])
    path = raw / "000_00000.parquet"
    texts = [text.encode() for text in TEXTS[:100]] + [b"\xff"] + [text.encode() for text in TEXTS[100:199]]
    pq.write_table(pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}), path)
    line = {"name": path.name, "bytes": path.stat().st_size, "rows": 200, "sha256": sha256_file(path)}
    rewrite_manifest(raw, files=[line])
    refused(tmp_path, raw, "row 101: the text is not UTF-8", shard_tokens=4096)
    rewrite_manifest(raw, bad_rows="skip")
    result, _ = run(raw, build_in(tmp_path / "skipping"), 4096)
    assert result["documents"] == 199
