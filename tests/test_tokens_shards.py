"""Shards are llm.c's: read here by a reader written from its description, and refused when they are anything else."""

import array
import json
import struct
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import write_shards

from pipelib.errors import UserError
from pipelib.files import sha256_file
from pipelib.tokens import shards as module
from pipelib.tokens.shards import (
    Manifest,
    Shard,
    count_tokens,
    header,
    open_shard,
    read_manifest,
    shard_problems,
    verify_shards,
    write_shard,
)
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import MANIFEST


def read_as_llm_c(path: Path) -> list[int]:
    """Tokens of a file as llm.c's data loader describes it: 256 int32 (magic, version, count), then uint16."""
    content = path.read_bytes()
    numbers = struct.unpack("<256i", content[:1024])
    assert numbers[0] == 20240520
    assert numbers[1] == 1
    assert set(numbers[3:]) == {0}
    tokens = array.array("H", content[1024:])
    if sys.byteorder == "big":
        tokens.byteswap()
    assert len(tokens) == numbers[2]
    return tokens.tolist()


def pieces_of(*lengths: int) -> list[np.ndarray]:
    """0, 1, 2, ... in pieces of the given lengths."""
    ends = np.cumsum([0, *lengths])
    return [np.arange(start, end, dtype=np.uint16) for start, end in pairwise(ends)]


@settings(max_examples=60, deadline=None, database=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=12))
def test_pieces_of_any_length_make_the_same_shard(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    path, total = tmp_path_factory.mktemp("shards") / "train_000001.bin", sum(lengths)
    shard, counts = write_shard(path, total, pieces_of(*lengths), GPT2_TOKENIZER)
    assert read_as_llm_c(path) == list(range(total))
    assert shard == Shard("train_000001.bin", "train", total, 0, sha256_file(path))
    assert counts.tolist() == [1] * total + [0] * (GPT2_TOKENIZER.size - total)
    assert list(path.parent.iterdir()) == [path]


def test_a_wrong_number_of_tokens_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="got 3 tokens and was to get 4"):
        write_shard(tmp_path / "val_000000.bin", 4, pieces_of(3), GPT2_TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_names_counts_and_hashes(tmp_path: Path) -> None:
    tokens = np.array(
        [GPT2_TOKENIZER.end_token_id, 5, 6, GPT2_TOKENIZER.end_token_id, 7, GPT2_TOKENIZER.end_token_id, 8], np.uint16
    )
    shards = write_shards(tmp_path, [tokens], 4)
    assert [(shard.name, shard.split, shard.tokens, shard.documents) for shard in shards] == [
        ("val_000000.bin", "val", 4, 2),
        ("train_000001.bin", "train", 3, 1),
    ]
    assert [shard.sha256 for shard in shards] == [sha256_file(tmp_path / shard.name) for shard in shards]


def test_ours_reads_a_file_that_llm_c_wrote(tmp_path: Path) -> None:
    numbers = [20240520, 1, 3, *[0] * 253]
    (tmp_path / "a.bin").write_bytes(struct.pack("<256i", *numbers) + struct.pack("<3H", 50256, 1, 65535))
    tokens = open_shard(tmp_path / "a.bin")
    assert tokens.tolist() == [50256, 1, 65535]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with a shard's header"),
        (header(5)[:1023], "does not begin with a shard's header"),
        (b"x" * 2000, "does not begin with a shard's header"),
        (struct.pack("<256i", 20240520, 2, *[0] * 254) + b"ab", "does not begin with a shard's header"),
        (header(5) + bytes(9), "has 1033 bytes where its header's 5 tokens need 1034"),
        (header(5) + bytes(12), "has 1036 bytes where its header's 5 tokens need 1034"),
        (header(0), "holds no tokens"),
    ],
)
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.bin {message}.*pipelib verify data/tokens --repair"):
        open_shard(tmp_path / "a.bin")


def test_a_missing_shard_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.bin is missing, so its tokens cannot be read; run dvc repro"):
        open_shard(tmp_path / "a.bin")


def test_problems_of_a_shard(tmp_path: Path) -> None:
    (shard,) = write_shards(tmp_path, pieces_of(10), 10)
    path = tmp_path / shard.name
    assert shard_problems(tmp_path, shard, GPT2_TOKENIZER) == []
    content = bytearray(path.read_bytes())
    content[1030] ^= 1
    path.write_bytes(content)
    (problem,) = shard_problems(tmp_path, shard, GPT2_TOKENIZER)
    assert "its bytes changed" in problem
    content[1030:1032] = (GPT2_TOKENIZER.size).to_bytes(2, "little")
    path.write_bytes(content)
    assert (
        f"holds the token {GPT2_TOKENIZER.size}"
        in shard_problems(tmp_path, replace(shard, sha256=sha256_file(path)), GPT2_TOKENIZER)[0]
    )
    assert (
        "has 10 tokens and the manifest says 11"
        in shard_problems(tmp_path, replace(shard, tokens=11), GPT2_TOKENIZER)[0]
    )


def test_counts_of_tokens() -> None:
    counts = count_tokens([np.array([1, 1, 50256], np.uint16), np.array([1], np.uint16)], GPT2_TOKENIZER.size)
    assert counts.shape == (GPT2_TOKENIZER.size,)
    assert (counts[1], counts[50256], counts.sum()) == (3, 1, 4)


# ---- The manifest ----------------------------------------------------------------------------------------------------

SHARDS = (Shard("val_000000.bin", "val", 4, 2, "a" * 64), Shard("train_000001.bin", "train", 3, 1, "b" * 64))
WHOLE = Manifest({"name": "gpt2", "vocabulary_sha256": "c"}, {"kind": "docs"}, SHARDS)


def test_a_manifest_comes_back_with_its_fingerprint(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    assert read_manifest(tmp_path) == WHOLE
    assert read_manifest(tmp_path).fingerprint == WHOLE.fingerprint
    assert (WHOLE.tokens("val"), WHOLE.tokens("train")) == (4, 3)


def test_the_fingerprint_follows_every_token_and_the_source() -> None:
    others = [
        replace(WHOLE, source={"kind": "hub"}),
        replace(WHOLE, encoding={"name": "gpt3"}),
        replace(WHOLE, shards=SHARDS[:1]),
        replace(WHOLE, shards=SHARDS[::-1]),
        replace(WHOLE, shards=(SHARDS[0], replace(SHARDS[1], sha256="d" * 64))),
    ]
    assert len({manifest.fingerprint for manifest in [WHOLE, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds '\\[\\]' and not a JSON object"),
        ('{"version": 2}', "has version 2 and this code reads 1"),
        ('{"version": 1}', "is not a manifest of shards"),
        ('{"version": 1, "encoding": {}, "source": {}, "shards": [{"name": "a"}]}', "is not a manifest of shards"),
        (json.dumps({"version": 1, "encoding": {}, "source": {}, "shards": None}), "is not a manifest of shards"),
        (json.dumps({"version": 1, "encoding": {}, "source": [], "shards": []}), "is not a manifest of shards"),
        (
            json.dumps(
                {
                    "version": 1,
                    "encoding": {},
                    "source": {},
                    "shards": [{"name": "a", "split": "val", "tokens": "9", "documents": 1, "sha256": ""}],
                }
            ),
            "tokens is '9'",
        ),
    ],
)
def test_what_is_no_manifest_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path)


def test_shards_that_were_found_right_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(30, dtype=np.uint16)
    manifest = Manifest(GPT2_TOKENIZER.encoding, {}, tuple(write_shards(tmp_path, [tokens], 10)))
    read: list[str] = []

    def noted(folder: Path, shard: Shard, tokenizer: Tokenizer) -> list[str]:
        read.append(shard.name)
        return shard_problems(folder, shard, tokenizer)

    monkeypatch.setattr(module, "shard_problems", noted)
    record, names = tmp_path / "record.json", [shard.name for shard in manifest.shards]
    verify_shards(tmp_path, manifest, record)
    verify_shards(tmp_path, manifest, record)
    assert sorted(read) == sorted(names)
    damaged = tmp_path / names[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    for _ in range(2):  # what is wrong is not noted as right
        with pytest.raises(UserError, match=f"{names[1]}.*its bytes changed"):
            verify_shards(tmp_path, manifest, record)
    assert read[3:] == [names[1]] * 2
    (tmp_path / names[2]).unlink()
    with pytest.raises(UserError, match=f"{names[2]} is missing"):
        verify_shards(tmp_path, manifest, record)
    read.clear()
    for content in (json.dumps({"manifest": "another", "files": {}}), "{", "[]", '{"files": 3}'):
        record.write_text(content)
        with pytest.raises(UserError):
            verify_shards(tmp_path, manifest, record)
    assert sorted(read) == sorted(names * 4), "a record of others, or a damaged one, says nothing"
