"""The batch of a step is a function of the data, the seed and the step, and of nothing else."""

import hashlib
import os
import struct
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import write_shards

from pipelib.errors import UserError
from pipelib.tokens.loader import (
    MAX_OPEN_SHARDS,
    BatchPlan,
    Loader,
    Rows,
    TokenStream,
    permute,
    training_rows,
    validation_batches,
)
from pipelib.tokens.shards import Manifest

FINGERPRINT = "0123456789abcdef" * 4
T = 8


def write_tokens(folder: Path, count: int, shard_tokens: int) -> Manifest:
    """0, 1, 2, ... in shards; the first is the validation split."""
    stream = [np.arange(count, dtype=np.uint16)]
    return Manifest({}, {}, tuple(write_shards(folder, stream, shard_tokens)))


# ---- The permutation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65_537])
def test_every_index_is_hit_once(count: int) -> None:
    assert sorted(permute(np.arange(count), count, key=3).tolist()) == list(range(count))


@settings(max_examples=60, deadline=None, database=None)
@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), data=st.data())
def test_an_index_goes_to_the_same_place_alone_as_among_others(count: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    whole = permute(np.arange(count), count, key)
    assert len(set(whole.tolist())) == count
    assert permute(np.array([index]), count, key)[0] == whole[index]


def test_keys_give_orders_that_have_nothing_to_do_with_each_other() -> None:
    count = 10_000
    orders = [permute(np.arange(count), count, key) for key in range(6)]
    for number, order in enumerate([np.arange(count), *orders]):
        for other in orders[number:]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05  # five standard deviations
            assert (order == other).sum() < 12  # one is expected


def test_the_order_is_pinned() -> None:
    """A change here changes what every seed trains on, so that no run from before can be reproduced."""
    assert permute(np.arange(12), 12, key=1).tolist() == [4, 6, 7, 2, 10, 8, 11, 3, 5, 9, 1, 0]
    assert BatchPlan(FINGERPRINT, 1337, 1000, 6).rows(4711).tolist() == [670, 227, 833, 663, 224, 924]


# ---- The plan --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, database=None)
@given(row_count=st.integers(1, 200), rows_per_step=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_every_row_comes_once_in_every_epoch(row_count: int, rows_per_step: int, seed: int) -> None:
    plan = BatchPlan(FINGERPRINT, seed, row_count, rows_per_step)
    steps = 3 * row_count // rows_per_step + 1
    rows = np.concatenate([plan.rows(step) for step in range(steps)]).tolist()
    for epoch in range(len(rows) // row_count):
        assert sorted(rows[epoch * row_count : (epoch + 1) * row_count]) == list(range(row_count))
    assert plan.epochs(steps) == len(rows) / row_count


def test_epochs_seeds_and_data_have_orders_of_their_own() -> None:
    def order(fingerprint: str = FINGERPRINT, seed: int = 1, epoch: int = 0) -> tuple[int, ...]:
        return tuple(BatchPlan(fingerprint, seed, 100, 100).rows(epoch).tolist())

    assert order() == order()
    assert len({order(), order(seed=2), order(fingerprint="f" * 64), order(epoch=1), order(epoch=2)}) == 5


# ---- Rows ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, database=None)
@given(count=st.integers(3, 120), shard_tokens=st.integers(1, 40), data=st.data())
def test_reading_across_shards(
    tmp_path_factory: pytest.TempPathFactory, count: int, shard_tokens: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    manifest = write_tokens(folder, count, shard_tokens)
    stream = TokenStream({folder / shard.name: shard.tokens for shard in manifest.shards})
    start = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(1, count - start))
    assert stream.read(start, length).tolist() == list(range(start, start + length))


def open_files(folder: Path) -> list[str]:
    """Files below a folder that this process has open, or mapped."""
    found = [link.readlink().as_posix() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [path for path in found if path.startswith(f"{folder}/")]


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_thousand_shards_are_opened_when_they_are_read_and_few_stay_open(tmp_path: Path) -> None:
    manifest = write_tokens(tmp_path, 20_000, 20)
    rows = training_rows(tmp_path, manifest, T)
    assert len(manifest.split("train")) == 999
    assert open_files(tmp_path) == []
    inputs, _ = rows.batch(np.arange(len(rows)))
    assert inputs.reshape(-1).tolist() == list(range(20, 20 + len(rows) * T))
    assert len(open_files(tmp_path)) == MAX_OPEN_SHARDS
    del rows
    assert open_files(tmp_path) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "train_000001.bin is missing, so its tokens cannot be read; run dvc repro"),
        (
            lambda path: os.truncate(path, 1024 + 2 * 30),
            "train_000001.bin has 1084 bytes where its header's 40 tokens need",
        ),
        (lambda path: path.write_bytes(b"x" * 2000), "train_000001.bin does not begin with a shard's header"),
    ],
)
def test_a_shard_that_is_spoilt_before_it_is_opened_is_named(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    rows = training_rows(tmp_path, write_tokens(tmp_path, 200, 40), T)
    spoil(tmp_path / "train_000001.bin")
    rows.batch(np.array([len(rows) - 1]))  # from another shard
    with pytest.raises(UserError, match=message):
        rows.batch(np.array([0]))


def test_a_shard_that_is_cut_short_while_it_is_open_is_named(tmp_path: Path) -> None:
    rows = training_rows(tmp_path, write_tokens(tmp_path, 200, 40), T)
    rows.batch(np.array([0]))
    os.truncate(tmp_path / "train_000001.bin", 1024 + 2 * 8)
    with pytest.raises(
        UserError, match=r"train_000001\.bin ends before token 9, so it was cut short after it was checked"
    ):
        rows.batch(np.array([0]))


def test_rows_are_consecutive_tokens_with_targets_one_further(tmp_path: Path) -> None:
    manifest = write_tokens(tmp_path, 1000, 37)  # a row of 9 tokens crosses a shard's end every now and then
    rows = training_rows(tmp_path, manifest, T)
    assert len(rows) == (1000 - 37 - 1) // T
    inputs, targets = rows.batch(np.arange(len(rows)))
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.reshape(-1).tolist() == list(range(37, 37 + len(rows) * T))
    assert np.array_equal(targets, inputs + 1)


def test_a_stream_shorter_than_a_row_has_none(tmp_path: Path) -> None:
    manifest = write_tokens(tmp_path, 40 + T, 40)
    assert len(training_rows(tmp_path, manifest, T)) == 0


# ---- The loader ------------------------------------------------------------------------------------------------------

ROWS_PER_STEP = 16


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    folder = tmp_path_factory.mktemp("tokens")
    return training_rows(folder, write_tokens(folder, 1000, 101), T)


@pytest.fixture(scope="module")
def plan(rows: Rows) -> BatchPlan:
    return BatchPlan(FINGERPRINT, 1, len(rows), ROWS_PER_STEP)


def global_batch(rows: Rows, plan: BatchPlan, step: int, micro_batch_size: int, world_size: int) -> np.ndarray:
    """The inputs of all ranks, micro-step by micro-step."""
    ranks = [
        Loader(rows, plan, micro_batch_size, rank, world_size, tuple).micro_batches(step) for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {ROWS_PER_STEP // micro_batch_size // world_size}
    return np.concatenate([inputs for batches in zip(*ranks, strict=True) for inputs, _ in batches])


@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(2, 1), (2, 2), (2, 4), (2, 8), (1, 8), (16, 1), (4, 2)])
def test_any_number_of_ranks_makes_the_same_global_batch(
    rows: Rows, plan: BatchPlan, micro_batch_size: int, world_size: int
) -> None:
    for step in (0, 1, 7, 4711):  # 7 is where the first epoch of 112 rows ends
        expected, _ = rows.batch(plan.rows(step))
        assert np.array_equal(global_batch(rows, plan, step, micro_batch_size, world_size), expected)


@settings(max_examples=30, deadline=None, database=None)
@given(
    row_count=st.integers(1, 400),
    micro_batch_size=st.integers(1, 4),
    micro_steps=st.integers(1, 3),
    seed=st.integers(0, 2**31),
    step=st.integers(0, 10_000),
    shard_tokens=st.integers(20, 500),
)
def test_the_global_batch_has_one_hash_whatever_the_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    row_count: int,
    micro_batch_size: int,
    micro_steps: int,
    seed: int,
    step: int,
    shard_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    manifest = write_tokens(folder, shard_tokens + row_count * T + 1, shard_tokens)
    rows = training_rows(folder, manifest, T)
    plan = BatchPlan(FINGERPRINT, seed, len(rows), micro_steps * micro_batch_size * 24)
    hashes = set()
    for world_size in (1, 2, 3, 4, 8):
        ranks = [
            Loader(rows, plan, micro_batch_size, rank, world_size, tuple).micro_batches(step)
            for rank in range(world_size)
        ]
        in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
        digest = hashlib.sha256()
        for part in (0, 1):
            digest.update(np.concatenate([batch[part] for batch in in_order]).tobytes())
        hashes.add(digest.hexdigest())
    assert len(hashes) == 1


def test_the_permutation_of_ten_billion_tokens_takes_no_memory_to_speak_of() -> None:
    plan = BatchPlan(FINGERPRINT, 1, 10_000_000_000 // 1024, 512)
    tracemalloc.start()
    plan.rows(19_072)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_loader_reads_shards_that_another_program_wrote(tmp_path: Path) -> None:
    """Files as llm.c's tools write them: 256 int32 of header, then uint16."""
    tokens = list(range(50257 - 300, 50257))
    for name, part in (("a.bin", tokens[:101]), ("b.bin", tokens[101:])):
        header = struct.pack("<256i", 20240520, 1, len(part), *[0] * 253)
        (tmp_path / name).write_bytes(header + struct.pack(f"<{len(part)}H", *part))
    rows = Rows(TokenStream({tmp_path / "a.bin": 101, tmp_path / "b.bin": 199}), T)
    plan = BatchPlan(FINGERPRINT, 1, len(rows), len(rows))
    ((inputs, targets),) = Loader(rows, plan, len(rows), 0, 1, tuple).micro_batches(0)
    order = np.argsort(inputs[:, 0])
    assert inputs[order].flatten().tolist() == tokens[: len(rows) * T]
    assert targets[order].flatten().tolist() == tokens[1 : len(rows) * T + 1]


def test_batches_ahead_are_prepared_on_the_loaders_thread(rows: Rows, plan: BatchPlan) -> None:
    loader = Loader(rows, plan, 4, 0, 1, lambda _: threading.current_thread().name)
    assert set(loader.micro_batches(3)) == {"MainThread"}
    assert all(name.startswith("loader") for name in loader.micro_batches(4))


def test_what_was_read_ahead_is_what_would_have_been_read(rows: Rows, plan: BatchPlan) -> None:
    def inputs(loader: Loader, step: int) -> list[list[int]]:
        return np.concatenate([batch for batch, _ in loader.micro_batches(step)]).tolist()

    loader = Loader(rows, plan, 4, 0, 1, tuple)
    in_turn = [inputs(loader, step) for step in range(20)]
    assert in_turn == [inputs(Loader(rows, plan, 4, 0, 1, tuple), step) for step in range(20)]
    jumping = Loader(rows, plan, 4, 0, 1, tuple)
    for step in (5, 6, 6, 2, 3, 19, 0):
        assert inputs(jumping, step) == in_turn[step]


# ---- Validation ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, database=None)
@given(count=st.integers(2, 200), length=st.integers(1, 50), rows_per_batch=st.integers(1, 9))
def test_every_token_but_the_first_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, length: int, rows_per_batch: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write_tokens(folder, count, count)
    inputs, targets = [], []
    for batch in validation_batches(folder / "val_000000.bin", length, rows_per_batch, None):
        assert batch[0].shape == batch[1].shape
        assert len(batch[0]) <= rows_per_batch
        inputs += batch[0].reshape(-1).tolist()
        targets += batch[1].reshape(-1).tolist()
    assert inputs == list(range(count - 1))
    assert targets == list(range(1, count))


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (T - 1, 0), (T, T), (5 * T + 3, 5 * T), (10**9, 12 * T)])
def test_a_limit_gives_whole_rows_from_the_start(tmp_path: Path, tokens: int, expected: int) -> None:
    write_tokens(tmp_path, 100, 100)
    batches = list(validation_batches(tmp_path / "val_000000.bin", T, 2, tokens))
    assert [token for inputs, _ in batches for token in inputs.reshape(-1).tolist()] == list(range(expected))
