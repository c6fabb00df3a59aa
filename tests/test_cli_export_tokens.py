"""Exported shards hold the same tokens in files that other programs find by their names."""

from pathlib import Path

import numpy as np
import pytest
from small_corpus import write_shards

from pipelib.cli.main import main
from pipelib.tokens.shards import Manifest
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.chdir(tmp_path)
    tokens = np.arange(2500, dtype=np.uint16)
    Manifest(GPT2_TOKENIZER.encoding, {}, tuple(write_shards(Path("data/tokens"), [tokens], 1000))).write(
        Path("data/tokens")
    )
    return tokens


def test_build_nanogpts_loader_finds_every_token_in_order(tokens: np.ndarray) -> None:
    assert main(["export-tokens", "--format", "npy", "--out", "out"]) == 0
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy", "edufineweb_val_000000.npy"]
    # it takes the files of the folder whose names contain the split, sorted, and loads each as one array
    read = [np.load(Path("out") / name) for split in ("val", "train") for name in names if split in name]
    assert {array.dtype for array in read} == {np.dtype("uint16")}
    assert np.array_equal(np.concatenate(read), tokens)


def test_a_damaged_shard_is_not_exported(tokens: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    path = Path("data/tokens/train_000001.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["export-tokens", "--format", "npy", "--out", "out"]) == 1
    assert "its bytes changed" in capsys.readouterr().err
    assert [path.name for path in Path("out").iterdir()] == ["edufineweb_val_000000.npy"]


def test_a_folder_in_use_and_a_missing_one(tokens: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: ARG001
    Path("out").mkdir()
    Path("out/file").touch()
    assert main(["export-tokens", "--format", "npy", "--out", "out"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["export-tokens", "--tokens", "nowhere", "--format", "npy", "--out", "new"]) == 1
    assert "run the stage that makes it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["edu_val", "train", "../x"])
def test_a_name_that_says_another_split_or_place(
    tokens: np.ndarray,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    assert main(["export-tokens", "--format", "npy", "--out", "out", "--name", name]) == 1
    assert "would take one for the other" in capsys.readouterr().err
    assert not Path("out").exists()
