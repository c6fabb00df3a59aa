"""The model of a run: of the workspace, of another checkout, of a commit or an experiment out of DVC's cache."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from small_chat import base_model
from small_vocabulary import TOKENIZER
from test_cli_compare import git, put_into_cache, write_run

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.files import files_under, remove, sha256_file
from pipelib.inspection.run_model import model_of_run
from pipelib.model.huggingface import export_model
from pipelib.vocabulary.chat import ChatTemplate


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A repository with a fine-tuned run at HEAD, and an experiment without fine-tuning; the hashes of their weights."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet", "--initial-branch=main"], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / ".gitignore").write_text("/models/\n/chat/\n/reports/\n/vocabulary/\n/.dvc/cache\n")
    found = {}
    for name, seed in (("HEAD", 1), ("no-chat", 2)):
        write_run(tmp_path, 0.0, max_lr=1e-3 * seed)
        model = base_model("qwen3", TOKENIZER.size)
        model.initialise(seed)
        export_model(model, TOKENIZER, tmp_path / "models", {})
        remove(tmp_path / "chat")
        (tmp_path / "chat").mkdir()
        (tmp_path / "chat/manifest.json").write_text("{}")
        if name == "HEAD":
            model.initialise(3)
            export_model(model, TOKENIZER, tmp_path / "chat/model", {}, ChatTemplate.of(TOKENIZER))
        found[name] = sha256_file(tmp_path / ("chat/model" if name == "HEAD" else "models") / "model.safetensors")
        outs = [{"path": out, "md5": keep(tmp_path, tmp_path / out)} for out in ("models", "chat")]
        (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"train": {"outs": outs}}}))
        git("add", "--all")
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", name)
        if name != "HEAD":
            git("update-ref", f"refs/exps/ab/cdef/{name}", "HEAD")
            git("reset", "--quiet", "--hard", "HEAD~1")
    return found


def keep(root: Path, out: Path) -> str:
    """Put an out into DVC's cache; its MD5."""
    entries = [
        {"md5": put_into_cache(root, path.read_bytes()), "relpath": path.relative_to(out).as_posix()}
        for path in files_under(out)
    ]
    return put_into_cache(root, json.dumps(entries).encode(), ".dir")


def test_the_model_that_answers_is_taken_where_there_is_one(repository: dict[str, str], tmp_path: Path) -> None:
    for name, sha256 in repository.items():
        with model_of_run(name) as folder:
            assert sha256_file(folder / "model.safetensors") == sha256
            assert (folder / "chat_template.jinja").exists() == (name == "HEAD")
        assert not folder.exists()
    for name in ("workspace", str(tmp_path)):  # the last run's files are there, which has no model that answers
        with model_of_run(name) as folder:
            assert sha256_file(folder / "model.safetensors") == repository["no-chat"]
        assert folder.exists()


def test_chat_talks_to_it(
    repository: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import io

    assert repository
    said = []
    for name in ("HEAD", "no-chat"):
        monkeypatch.setattr("sys.stdin", io.StringIO("blue\n"))
        assert main(["chat", "--run", name, "--temperature", "0", "--tokens", "12"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    assert main(["chat", "--run", "HEAD", "--model", "models"]) == 1
    assert "--model and --run both name a model" in capsys.readouterr().err


def test_a_run_whose_model_is_gone_or_damaged_is_refused(repository: dict[str, str], tmp_path: Path) -> None:
    objects = tmp_path / ".dvc/cache/files/md5"
    for weights in [path for path in objects.glob("??/*") if path.stat().st_size > 50_000]:
        weights.write_bytes(b"x")
    for _ in range(2):
        for name in repository:
            with pytest.raises(UserError, match=r"is missing or damaged in DVC's cache"), model_of_run(name):
                pass
        for damaged in [path for path in objects.glob("??/*") if path.read_bytes() == b"x"]:
            damaged.unlink()
    for listing in objects.glob("??/*.dir"):
        listing.unlink()
    with (
        pytest.raises(UserError, match=r"--run HEAD: DVC's cache does not have the model of this run"),
        model_of_run("HEAD"),
    ):
        pass
    with (
        pytest.raises(UserError, match="large-rate is not a checkout, git revision or experiment"),
        model_of_run("large-rate"),
    ):
        pass
