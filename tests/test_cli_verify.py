"""Every kind of damage to a folder of shards is named, and repaired for good under DVC's hard links."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_corpus import write_shards
from small_project import copy_linked
from warm_python import run_python, write_python

import pipelib
from pipelib.cli.main import main
from pipelib.files import sha256_file
from pipelib.tokens.shards import (
    UNIGRAM_COUNTS,
    Manifest,
    count_tokens,
    open_shard,
    read_manifest,
)
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.workspace.places import MANIFEST

SOURCE = Path(pipelib.__file__).absolute().parents[1]
TRAIN = "train_000001.bin"


def make_tokens(folder: Path) -> None:
    """A validation shard and two training shards of 1,000 tokens, documents of 50."""
    tokens = np.random.default_rng(0).integers(0, GPT2_TOKENIZER.end_token_id, 3000).astype(np.uint16)
    tokens[::50] = GPT2_TOKENIZER.end_token_id
    manifest = Manifest(GPT2_TOKENIZER.encoding, {"kind": "test"}, tuple(write_shards(folder, [tokens], 1000)))
    counts = count_tokens((open_shard(folder / shard.name) for shard in manifest.split("train")), GPT2_TOKENIZER.size)
    np.save(folder / UNIGRAM_COUNTS, counts)
    manifest.write(folder)


def flip_bit(path: Path, offset: int, keep_time: bool = False) -> None:
    """As a failing disk does it: in place, whoever else links to the bytes."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(0o444)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_tokens(tmp_path / "data/tokens")
    return Path("data/tokens")


def test_good_shards_are_good(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.is_dir()
    assert main(["verify"]) == 0
    assert "data/tokens: good; the hashes of 3 files are right" in capsys.readouterr().out


def truncate(folder: Path) -> None:
    os.truncate(folder / TRAIN, 1024 + 2 * 999)


def foreign_token(folder: Path) -> None:
    """A token that GPT-2 does not have, under a hash that is right."""
    content = bytearray((folder / TRAIN).read_bytes())
    content[1026:1028] = (50300).to_bytes(2, "little")
    (folder / TRAIN).write_bytes(content)
    manifest = read_manifest(folder)
    sha256 = sha256_file(folder / TRAIN)
    shards = tuple(replace(shard, sha256=sha256) if shard.name == TRAIN else shard for shard in manifest.shards)
    replace(manifest, shards=shards).write(folder)


def wrong_documents(folder: Path) -> None:
    manifest = read_manifest(folder)
    shards = tuple(replace(shard, documents=7) if shard.name == TRAIN else shard for shard in manifest.shards)
    replace(manifest, shards=shards).write(folder)


def no_training(folder: Path) -> None:
    manifest = read_manifest(folder)
    replace(manifest, shards=manifest.shards[:1]).write(folder)


def wrong_counts(folder: Path) -> None:
    counts = np.load(folder / UNIGRAM_COUNTS)
    counts[5] += 1
    np.save(folder / UNIGRAM_COUNTS, counts)


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "magic": (lambda folder: flip_bit(folder / TRAIN, 0), TRAIN, "header"),
    "token": (lambda folder: flip_bit(folder / TRAIN, 2000), TRAIN, "its bytes changed"),
    "short": (truncate, TRAIN, "too few or too many tokens"),
    "missing": (lambda folder: (folder / TRAIN).unlink(), TRAIN, "is missing"),
    "a folder": (lambda folder: ((folder / TRAIN).unlink(), (folder / TRAIN).mkdir()), TRAIN, "cannot be read"),
    "foreign": (foreign_token, TRAIN, "the token 50300"),
    "documents": (wrong_documents, TRAIN, "20 documents and the manifest says 7"),
    "no training shard": (no_training, MANIFEST, "no train shard"),
    "counts": (wrong_counts, UNIGRAM_COUNTS, "does not match the tokens"),
    "counts missing": (lambda folder: (folder / UNIGRAM_COUNTS).unlink(), UNIGRAM_COUNTS, "is missing"),
    "counts empty": (lambda folder: (folder / UNIGRAM_COUNTS).write_bytes(b""), UNIGRAM_COUNTS, "not an array"),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST, "does not exist"),
    "manifest torn": (lambda folder: (folder / MANIFEST).write_text('{"version": 1'), MANIFEST, "not JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_removed(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, file, words = DAMAGE[name]
    damage(folder)
    assert main(["verify", str(folder)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert any(f"{folder / file}" in line and words in line for line in lines), lines
    if name == "no training shard":
        return  # the shards it does not list are unexpected files, too
    assert len(lines) == 1
    others = {path for path in folder.iterdir() if path.name != file}
    assert main(["verify", "--repair"]) == 0
    assert set(folder.iterdir()) == others  # without DVC only the file itself


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", "mine", "not in the manifest"),
        (MANIFEST, '{"version": 2, "shards": []}', "has version 2 and this code reads 1"),
    ],
)
def test_what_is_whole_is_named_and_left(
    name: str, content: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / name).write_text(content)
    before = sorted(folder.iterdir())
    assert main(["verify", "--repair"]) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert "removed" not in captured.out
    assert "not repaired: 1 of 1 problems, because nothing is damaged there" in captured.err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("manifest", ['{"version": 1}', '{"source": {}, "files": [], "documents": 0}'])
def test_a_folder_whose_manifest_lists_no_shards_is_not_taken_for_shards(
    manifest: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / MANIFEST).write_text(manifest)
    before = sorted(folder.iterdir())
    assert main(["verify", "data/tokens", "--repair"]) == 1
    assert "is not an out of dvc.lock and its manifest.json lists no shards" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_two_problems_are_both_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(folder / "val_000000.bin", 1500)
    flip_bit(folder / "train_000002.bin", 1500)
    assert main(["verify"]) == 1
    said = capsys.readouterr().err
    assert "has 2 problems" in said
    assert "val_000000.bin" in said
    assert "train_000002.bin" in said


def test_nothing_to_verify_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify"]) == 1
    assert "none of the outs in dvc.lock is here" in capsys.readouterr().err


def test_no_folder_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder, so there is nothing to verify" in capsys.readouterr().err


# ---- With the real DVC -----------------------------------------------------------------------------------------------

STAGE = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_cli_verify import make_tokens
from pipelib.workspace.workdir import WorkDir

with WorkDir("tokenize", {{"params": 1}}, {{}}) as state:
    if not state.finished:
        print("BUILDING", flush=True)
        make_tokens(state.work / "outs/data/tokens")
        for name in {files!r}:
            path = state.work / "outs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode() * 1000)
        state.finish()
    state.publish()
"""


RAW = ("data/raw/000_00000.parquet", "data/raw/manifest.json")
OTHERS = ("data/benchmarks/completion.jsonl", "models/model.safetensors", "curves/train.csv", "reports/evaluation.md")
FILES = (*RAW, *OTHERS)


class Repository:
    """A DVC repository with one stage that makes data/tokens as the tokenize stage does, its cache elsewhere.

    `FILES` are made too, and their folders are outs.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.cache = folder / "repository", folder / "cache"

    @classmethod
    def make(cls, folder: Path, cache_type: str) -> "Repository":
        """One in which the stage ran."""
        made = cls(folder)
        (made.root / ".dvc").mkdir(parents=True)
        subprocess.run(["git", "init", "--quiet"], cwd=made.root, check=True)
        (made.root / ".dvc/.gitignore").write_text("/tmp\n")
        (made.root / ".dvc/config").write_text(
            f"[core]\n    analytics = false\n    check_update = false\n[cache]\n    type = {cache_type}\n    dir = ../../cache\n"
        )
        program = STAGE.format(paths=[str(Path(__file__).parent), str(SOURCE)], files=FILES)
        (made.root / "make.py").write_text(program)
        outs = ["data/tokens", *sorted({str(Path(name).parent) for name in FILES})]
        write_python(folder / "python")
        stage = {"cmd": "../python make.py", "deps": ["make.py"], "outs": outs}
        (made.root / "dvc.yaml").write_text(json.dumps({"stages": {"tokenize": stage}}))
        made.repro()
        return made

    def dvc(self, *arguments: str) -> str:
        done = run_python("-m", "dvc", *arguments, cwd=self.root)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def repro(self) -> str:
        return self.dvc("repro")

    @property
    def lock(self) -> str:
        return (self.root / "dvc.lock").read_text()


@pytest.fixture
def own_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What DVC remembers of files is the test's own."""
    for name in [name for name in os.environ if name.startswith(("DVC_", "PIPELIB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "memo"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a repository with hard links."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("memo")))
        Repository.make(folder, "hardlink")
    return folder


@pytest.fixture
def repository(original: Path, own_memo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:  # noqa: ARG001
    """A copy of it, of which DVC remembers no file."""
    copy_linked(original, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy/repository")
    return Repository(tmp_path / "copy")


@pytest.fixture
def make_repository(own_memo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Repository]:  # noqa: ARG001
    """A repository of whose files DVC remembers the times."""

    def make(cache_type: str) -> Repository:
        made = Repository.make(tmp_path / "made", cache_type)
        monkeypatch.chdir(made.root)
        return made

    return make


@pytest.mark.dvc
def test_repair_under_hard_links(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    shard, before = Path("data/tokens") / TRAIN, repository.lock
    assert shard.stat().st_nlink == 3  # workspace, cache, finished state

    flip_bit(shard, 1500)
    assert "is cached - skipping run" in repository.repro()  # DVC restores the damage from its own damaged object
    assert main(["verify"]) == 1
    assert f"{shard} has sha256" in capsys.readouterr().err

    shard.unlink()
    repository.repro()
    assert main(["verify"]) == 1  # so deleting the file alone is no help

    assert main(["verify", "--repair"]) == 0
    assert f"removed {shard}" in capsys.readouterr().out
    assert not shard.exists()
    assert "BUILDING" in repository.repro()  # the finished state was damaged too, and did not bring it back
    assert main(["verify"]) == 0
    assert repository.lock == before
    assert "up to date" in repository.repro()


@pytest.mark.dvc
def test_repair_of_damage_that_changes_no_time(make_repository: Callable[[str], Repository]) -> None:
    repository = make_repository("hardlink")
    tokens, before = Path("data/tokens"), repository.lock
    flip_bit(tokens / TRAIN, 1500, keep_time=True)
    # A digit of a hash: the manifest stays readable and blames a good shard. Only DVC's md5 shows who is wrong.
    manifest = (tokens / MANIFEST).read_bytes()
    digest = read_manifest(tokens).shards[2].sha256.encode()
    flip_bit(tokens / MANIFEST, manifest.index(digest), keep_time=True)
    assert "didn't change, skipping" in repository.repro()
    assert main(["verify", "--repair"]) == 0
    assert "BUILDING" in repository.repro()
    assert main(["verify"]) == 0
    assert repository.lock == before


@pytest.mark.dvc
def test_repair_where_the_list_of_the_folder_is_damaged_too(make_repository: Callable[[str], Repository]) -> None:
    repository = make_repository("hardlink")
    before = repository.lock
    (md5,) = (
        out["md5"] for out in yaml.safe_load(before)["stages"]["tokenize"]["outs"] if out["path"] == "data/tokens"
    )
    listing = repository.cache / "files/md5" / md5[:2] / md5[2:]
    flip_bit(listing, 20, keep_time=True)
    flip_bit(Path("data/tokens") / TRAIN, 1500, keep_time=True)
    assert main(["verify", "--repair"]) == 0
    assert not listing.exists()
    assert "BUILDING" in repository.repro()
    assert listing.exists()
    assert main(["verify"]) == 0
    assert repository.lock == before


@pytest.mark.dvc
def test_a_sound_object_is_kept_where_dvc_copies(make_repository: Callable[[str], Repository]) -> None:
    repository = make_repository("copy")
    shard, before = Path("data/tokens") / TRAIN, repository.lock
    objects = sorted(repository.cache.glob("files/md5/??/*"))
    flip_bit(shard, 1500, keep_time=True)
    assert main(["verify", "--repair"]) == 0
    assert sorted(repository.cache.glob("files/md5/??/*")) == objects
    assert "checking out outputs" in repository.repro()
    assert main(["verify"]) == 0
    assert repository.lock == before


@pytest.mark.dvc
@pytest.mark.usefixtures("repository")
def test_nothing_is_removed_when_the_cache_cannot_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    shard = Path("data/tokens") / TRAIN
    flip_bit(shard, 1500)
    Path(".dvc/config").write_text("this is no configuration")
    assert main(["verify", "--repair"]) == 1
    assert "`dvc cache dir` failed" in capsys.readouterr().err
    assert shard.exists()


@pytest.mark.dvc
def test_every_out_is_verified_and_repaired(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    before = repository.lock
    assert main(["verify"]) == 0
    said = capsys.readouterr().out
    for folder in ("data/tokens", "data/raw", "data/benchmarks", "models", "curves", "reports"):
        assert f"{folder}: good; the hashes of" in said

    bad = [Path(name) for name in (RAW[0], *OTHERS)]
    for path in bad:
        flip_bit(path, 1500)
    bad[0].unlink()
    assert "BUILDING" not in repository.repro()
    assert bad[0].exists()  # DVC brings the damage back
    assert main(["verify", "data/raw"]) == 1
    said = capsys.readouterr().err
    assert "data/raw has 1 problem" in said
    assert f"{bad[0]} has md5" in said
    assert "models" not in said
    assert main(["verify", str(OTHERS[0])]) == 1  # what lies in an out names the out
    assert "data/benchmarks has 1 problem" in capsys.readouterr().err

    assert main(["verify", "--repair"]) == 0
    assert [path.exists() for path in bad] == [False] * len(bad)
    assert Path(RAW[1]).exists()
    assert "BUILDING" in repository.repro()
    assert main(["verify"]) == 0
    assert repository.lock == before
    assert "up to date" in repository.repro()


@pytest.mark.dvc
def test_good_files_and_the_users_files_stay(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    objects = sorted(repository.cache.glob("files/md5/??/*"))
    assert main(["verify", "data/raw", "--repair"]) == 0  # its manifest has no version and lists no shards
    Path("data/raw/notes.txt").write_text("mine")
    assert main(["verify", "data", "--repair"]) == 1
    assert "data/raw/notes.txt is not in DVC's list" in capsys.readouterr().err
    assert sorted(map(str, Path("data/raw").iterdir())) == [*RAW, "data/raw/notes.txt"]
    assert sorted(repository.cache.glob("files/md5/??/*")) == objects


@pytest.mark.dvc
def test_another_version_is_no_damage(repository: Repository, capsys: pytest.CaptureFixture[str]) -> None:
    lock = repository.lock
    program = Path("make.py").read_text()
    Path("make.py").write_text(program.replace("* 1000", "* 999").replace('"params": 1', '"params": 2'))
    repository.repro()
    objects = sorted(repository.cache.glob("files/md5/??/*"))
    Path("dvc.lock").write_text(lock)  # as `git checkout` does
    assert main(["verify", "data/raw", "--repair"]) == 1
    assert f"{RAW[0]} is intact but of another version than dvc.lock has" in capsys.readouterr().err
    assert all(Path(name).exists() for name in RAW)
    assert sorted(repository.cache.glob("files/md5/??/*")) == objects


@pytest.mark.dvc
def test_where_dvcs_list_is_lost_the_folders_hash_and_the_links_tell(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    for listing in repository.cache.glob("files/md5/??/*.dir"):
        listing.unlink()
    assert main(["verify", "data/raw"]) == 0
    flip_bit(Path(RAW[0]), 1500)
    assert main(["verify", "data/raw", "--repair"]) == 0
    assert f"{RAW[0]} does not have the md5 in the name of its object in DVC's cache" in capsys.readouterr().err
    assert [Path(name).exists() for name in RAW] == [False, True]
    Path(RAW[0]).write_text("no link of an object")
    assert main(["verify", "data/raw", "--repair"]) == 1
    assert "it is unknown which file is wrong" in capsys.readouterr().err
    assert all(Path(name).exists() for name in RAW)
