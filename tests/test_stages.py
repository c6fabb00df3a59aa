"""Stages as processes: bad input gets one message and a status, no traceback, and leaves nothing half-written."""

import csv
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from small_corpus import make_novel, make_texts, write_jsonl, write_raw_files
from small_params import PARAMS, write_params
from small_project import Project
from small_vocabulary import TOKENIZER

from pipelib.errors import UserError
from pipelib.files import read_json, sha256_file, write_json
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model
from pipelib.model.shapes.gpt2 import GPT2Section
from pipelib.stage import run_stage

STAGES = ("download", "vocabulary", "tokenize", "train", "evaluate")


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with raw text and shards; tests copy it."""
    project = Project.make(tmp_path_factory.mktemp("project") / "root")
    write_raw_files(project.root / "data/raw", [make_texts(60), make_texts(40, seed=1)])
    write_json(project.root / "data/benchmarks/manifest.json", {})
    project.runs("vocabulary")
    project.runs("tokenize")
    return project


@pytest.fixture
def project(tmp_path: Path, tokenized: Project) -> Project:
    root = tmp_path / "project"
    shutil.copytree(tokenized.root, root)
    shutil.rmtree(root / ".pipelib/tokenize")
    return Project(root)


@pytest.fixture
def bare(tmp_path: Path) -> Project:
    return Project.make(tmp_path / "project")


# ---- Parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_misspelt_parameter(bare: Project, name: str) -> None:
    path = bare.root / "params.yaml"
    path.write_text(path.read_text().replace("max_lr: 0.01", "max_rl: 0.01").replace("n_layer: 2", "n_layer: 0"))
    message = bare.refuses(
        name,
        "params.yaml has 3 problems; nothing was run.",
        "train.max_rl is not a parameter, so its value would be ignored; did you mean train.max_lr?",
        "train.max_lr is missing",
        "model.n_layer: 0 must be greater than 0",
    )
    assert message.count("\n") == 4
    assert bare.files() == set()
    assert not (bare.root / ".pipelib").exists()


def test_no_parameters(bare: Project) -> None:
    (bare.root / "params.yaml").unlink()
    bare.refuses("train", "params.yaml does not exist", "copy one from presets/")


def test_a_micro_batch_that_does_not_divide(project: Project) -> None:
    write_params(project.root, train__micro_batch_size=3)
    project.refuses("train", "train.micro_batch_size: 3 rows of 16 tokens do not divide global_batch_tokens = 64")


# ---- How a stage is started ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("cwd", [".", "elsewhere", "stages"])
def test_a_stage_run_by_its_path_says_how_to_run_it(bare: Project, name: str, cwd: str) -> None:
    (bare.root / "elsewhere").mkdir()
    done = bare.python(str(bare.root / f"stages/{name}.py"), cwd=bare.root / cwd)
    assert done.returncode == 1
    assert done.stderr.startswith(f"stages/{name}.py was run by its path, so ")
    assert f"python -m stages.{name}" in done.stderr
    assert "Traceback" not in done.stderr


def make_other_checkout(folder: Path) -> Path:
    (folder / "pipelib").mkdir(parents=True)
    (folder / "pipelib/__init__.py").write_text("")
    (folder / "pipelib/params.py").write_text("raise RuntimeError('the other checkout')")
    return folder


def test_an_installed_checkout_does_not_win_over_the_stages_own(bare: Project, tmp_path: Path) -> None:
    other = make_other_checkout(tmp_path / "other")
    bare.refuses("tokenize", "data/raw/manifest.json does not exist", PYTHONPATH=str(other))


def test_children_of_a_stage_import_its_checkout_too(bare: Project, tmp_path: Path) -> None:
    child = "import subprocess, sys, stages; "
    child += "subprocess.run([sys.executable, '-c', 'import pipelib; print(pipelib.__file__)'], cwd='/', check=True)"
    done = bare.python("-c", child, environment={"PYTHONPATH": str(make_other_checkout(tmp_path / "other"))})
    assert done.stdout.strip() == str(bare.root / "src/pipelib/__init__.py")


def test_another_checkout_that_was_imported_first_is_an_error(bare: Project, tmp_path: Path) -> None:
    other = make_other_checkout(tmp_path / "other")
    done = bare.python("-c", "import pipelib, stages", environment={"PYTHONPATH": str(other)})
    assert done.returncode == 1
    assert done.stderr.startswith(f"pipelib was imported from {other}/pipelib/__init__.py, not from {bare.root}/src")
    assert "Traceback" not in done.stderr


# ---- Bad data --------------------------------------------------------------------------------------------------------


def test_an_empty_corpus(bare: Project) -> None:
    bare.refuses("download", "download.path: texts does not exist")
    (bare.root / "texts").mkdir()
    bare.refuses("download", "texts has no file that matches")
    (bare.root / "texts/a.jsonl").write_text("")
    bare.refuses("download", "download.source: local gave no documents, so there is nothing to train on")
    write_jsonl(bare.root / "texts/a.jsonl", ["", "  "])
    bare.refuses("download", "download.source: local gave no document")
    assert bare.files() == set()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("tokenize", "data/raw/manifest.json"),
        ("train", "data/tokens/manifest.json"),
        ("evaluate", "data/tokens/val_000000.bin"),
    ],
)
def test_a_stage_before_its_time(bare: Project, name: str, missing: str) -> None:
    bare.refuses(name, missing, "dvc repro")


def test_an_evaluation_without_a_model(project: Project) -> None:
    project.refuses("evaluate", "models/config.json does not exist, so there is nothing to evaluate; run dvc repro")


def test_a_corrupt_parquet_file(project: Project) -> None:
    path = project.root / "data/raw/001_00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    (project.root / "data/raw/manifest.json").write_text(
        (project.root / "data/raw/manifest.json").read_text() + "\n"
    )  # so that it is new input
    before = {name: sha256_file(project.root / name) for name in project.files()}
    project.refuses("tokenize", "data/raw/001_00000.parquet cannot be read as parquet")
    assert {name: sha256_file(project.root / name) for name in project.files()} == before


def test_two_machines_encode_their_shares_at_once(project: Project) -> None:
    shutil.rmtree(project.root / ".pipelib/units")
    expected = {name: sha256_file(project.root / name) for name in project.files() if name.startswith("data/tokens")}
    shutil.rmtree(project.root / "data/tokens")
    commands = [[sys.executable, "-m", "stages.tokenize", "--share", f"{index}/2"] for index in range(2)]
    shares = [subprocess.Popen(command, cwd=project.root, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [share.communicate()[0] for share in shares]
    assert [share.returncode for share in shares] == [0, 0]
    assert ["share 0/2 is complete" in said[0], "share 1/2 is complete" in said[1]] == [True, True]
    assert not (project.root / "data/tokens").exists()
    project.runs("tokenize")
    assert expected == {name: sha256_file(project.root / name) for name in expected}
    speed = read_json(project.root / "metrics/speed/tokenize.json")
    assert (speed["units"], speed["units_encoded"]) == (2, 0)


@pytest.mark.parametrize("share", ["2/2", ""])
def test_a_share_that_is_none(project: Project, share: str) -> None:
    done = project.python("-m", "stages.tokenize", "--share", share)
    assert done.returncode == 1
    assert f"tokenize: --share {share} is not i/n with i from 0 to n - 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_corpus_shorter_than_one_batch(project: Project) -> None:
    write_params(project.root, train__global_batch_tokens=2**20, train__max_tokens=2**22, train__warmup_steps=1)
    project.refuses(
        "train",
        "the training shards have ",
        "one step needs 65536 rows, so no step can be trained; lower train.global_batch_tokens or add",
    )


def test_a_training_ends_after_the_passes_that_are_allowed(project: Project) -> None:
    """Its learning rate falls to its end, as in a training that asks for no more tokens."""
    write_params(project.root, train__max_tokens=10**6, train__max_epochs=0.1)
    done = project.stage("train")
    assert done.returncode == 0, done.stderr
    steps = read_json(project.root / "metrics/train.json")["steps"]
    assert f"so the training ends after {64 * steps:,} of train.max_tokens = 1,000,000\n" in done.stdout
    with (project.root / "curves/train.csv").open(newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    assert len(rates) == steps
    assert rates[-1] < 0.2 * max(rates)


def test_ranks_that_cannot_share_a_step(project: Project) -> None:
    project.refuses("train", "3 ranks with train.micro_batch_size = 2 cannot share the 4 rows", PIPELIB_NPROC="3")
    project.refuses(
        "train", "PIPELIB_NPROC=all is not valid: it must be a whole number, 1 or more", PIPELIB_NPROC="all"
    )


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize("split", ["val_000000.bin", "train_000001.bin"])
def test_a_shard_cut_short(project: Project, split: str) -> None:
    path = project.root / "data/tokens" / split
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-2])
    project.refuses("train", f"data/tokens/{split} has {len(content) - 2} bytes where its header's", "pipelib verify")
    assert not (project.root / "models").exists()


def test_a_flipped_bit_in_a_shards_header(project: Project) -> None:
    flip_bit(project.root / "data/tokens/train_000001.bin", 1)
    project.refuses("train", "train_000001.bin does not begin with a shard's header", "pipelib verify data/tokens")


@pytest.mark.parametrize("split", ["val_000000.bin", "train_000001.bin"])
def test_a_flipped_bit_in_a_token(project: Project, split: str) -> None:
    flip_bit(project.root / "data/tokens" / split, 2000)
    words = f"data/tokens/{split} has sha256"
    project.refuses("train", words, "its bytes changed", "pipelib verify data/tokens --repair")
    assert not (project.root / "models").exists()
    done = project.python("-m", "pipelib.cli.main", "verify", environment={"PYTHONPATH": str(project.root / "src")})
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [b"not tensors", b""])
def test_evaluation_of_a_damaged_model(project: Project, content: bytes) -> None:
    export_model(
        GPT2(GPT2Section(**PARAMS["model"]), TOKENIZER.size),
        TOKENIZER,
        project.root / "models",
        "a model",
    )
    (project.root / "models/model.safetensors").write_bytes(content)
    project.refuses("evaluate", "models/model.safetensors")
    assert not (project.root / "reports").exists()


# ---- No space --------------------------------------------------------------------------------------------------------


def test_a_disk_that_gets_full(bare: Project) -> None:
    """The state lies on a file system of one megabyte, which only the stage sees; the text is larger."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    small = bare.root / ".pipelib"
    small.mkdir()
    write_jsonl(bare.root / "texts/a.jsonl", [os.urandom(2000).hex() for _ in range(2000)])
    script = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; exec "$2" -m stages.download'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(small), sys.executable],
        cwd=bare.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "download: the disk is full" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr
    assert bare.files() == set()


def test_too_little_space_for_tokenization_is_said_first(project: Project) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    small = project.root / "small"
    small.mkdir()
    shutil.rmtree(project.root / "data/tokens")
    write_raw_files(project.root / "data/raw", [[os.urandom(2000).hex() for _ in range(1000)]])
    script = 'mount -t tmpfs -o size=4m tmpfs "$1" || exit 77; PIPELIB_STATE_DIR="$1" exec "$2" -m stages.tokenize'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(small), sys.executable],
        cwd=project.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 1
    assert "tokenize: tokenization needs " in done.stderr
    assert "free, so it would fail half-way; free some space" in done.stderr


# ---- The frame -------------------------------------------------------------------------------------------------------


def raising(error: BaseException) -> NoReturn:
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("x is 5, so it fails; use 4."), "train: x is 5, so it fails; use 4."),
        (OSError(errno.ENOSPC, "No space", "data/a.bin"), "train: the disk is full (data/a.bin), so the stage stopped"),
        (OSError(errno.EDQUOT, "Quota"), "train: the disk is full (while writing), so the stage stopped"),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
    ],
)
def test_what_the_user_can_mend_is_one_message(error: BaseException, said: str | int) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage("train", lambda: raising(error))
    code = caught.value.code
    assert code == said if isinstance(said, int) else str(code).startswith(said)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "disk"), ValueError("ours"), AssertionError()])
def test_a_defect_of_ours_keeps_its_traceback(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage("train", lambda: raising(error))
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert "in raising" in said
    assert type(error).__name__ in said


def test_a_stage_that_worked_exits_with_0() -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage("train", lambda: None)
    assert caught.value.code == 0


@pytest.mark.long
def test_a_chinese_novel_comes_through_all_stages(bare: Project) -> None:
    (bare.root / "texts").mkdir()
    (bare.root / "texts/novel.txt").write_text(make_novel(1050), encoding="utf-8")
    write_params(
        bare.root,
        download__split="auto",
        download__benchmark_documents="auto",
        vocabulary__vocab_size=1024,
        tokenize__shard_tokens="auto",
        evaluate__tasks=["completion", "heldout"],
        evaluate__task_limit=10,
    )
    for stage in ("download", "vocabulary", "tokenize", "train", "finetune", "evaluate"):
        bare.runs(stage)
    assert read_json(bare.root / "metrics/evaluate.json")["completion"]["acc"]["items"] == 42
