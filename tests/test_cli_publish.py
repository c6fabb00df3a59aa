"""Publishing: what reaches the hub is the model with its card, and nothing that does not belong together is sent."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fake_hub import FakeHub

from pipelib.cli.main import main
from pipelib.evaluation.model_card import CHAT_FROM, REPRODUCE, evaluation_rows, licence, write_model_card
from pipelib.inspection.verify import _folder_md5, _sums
from pipelib.model.recipe import read_recipe, write_recipe
from pipelib.tokens.shards import Manifest, Shard
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

TOKEN = "hf_thisIsTheCanaryOfThePublishTests"
REPO = "somebody/a-small-gpt2"
SOURCE = {"kind": "hub", "repo": "HuggingFaceFW/fineweb-edu", "revision": "a" * 40, "files": [{"name": "x"}]}
RESULT = {
    "val_loss": 3.21,
    "completion": {"acc_norm": {"value": 0.2955, "low": 0.28, "high": 0.31, "items": 2105}},
    "lm_eval": {"heldout": {"bits_per_byte": 1.5, "version": 1.0, "examples": 100}},
}


def write_card(folder: Path) -> str:
    """models/, curves/ and the card that evaluate would write of them."""
    models, curves = folder / "models", folder / "curves"
    for path in (models, curves):
        path.mkdir(parents=True, exist_ok=True)
    (models / "model.safetensors").write_bytes(b"weights")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "model_type": "gpt2", "vocab_size": 50257}
    (models / "config.json").write_text(json.dumps(shape))
    recipe = {"data": {"fingerprint": "f"}, "code_sha256": "c0de", "train": {"max_lr": 6e-4, "text": "a | b"}}
    write_recipe(models, recipe, "A model", "gpt2")
    (curves / "train.csv").write_text("step,tokens,loss\n1,256,10.5\n2,512,9.5\n")
    (curves / "validation.csv").write_text("step,tokens,loss\n2,512,9.75\n")
    shards = (Shard("val_000000.bin", "val", 1000, 3, "0"), Shard("train_000001.bin", "train", 7000, 30, "1"))
    write_model_card(
        folder / "reports/model_card.md", models, curves, Manifest(GPT2_TOKENIZER.encoding, SOURCE, shards), RESULT
    )
    return (folder / "reports/model_card.md").read_text(encoding="utf-8")


def test_the_recipe_of_a_model_without_recipe_json_is_the_table_of_its_readme(tmp_path: Path) -> None:
    write_recipe(tmp_path, {"train": {"max_lr": 6e-4, "text": "a | b"}, "model": {"n_layer": 2}}, "A model", "gpt2")
    whole = {"train.max_lr": 6e-4, "train.text": "a | b", "model.n_layer": 2}
    assert read_recipe(tmp_path) == whole
    (tmp_path / "recipe.json").unlink()
    assert read_recipe(tmp_path) == whole
    (tmp_path / "README.md").unlink()
    assert read_recipe(tmp_path) == {}


def test_the_card_has_what_a_stranger_must_know(tmp_path: Path) -> None:
    card = write_card(tmp_path / "one")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert front["library_name"] == "transformers"
    for line in (
        "| val_loss | 3.2100 |  |",
        "| completion.acc_norm | 0.2955 (0.2800 to 0.3100) | 2,105 items |",
        "| lm_eval.heldout.bits_per_byte | 1.5000 | version 1.0, 100 examples |",
        "| training, its last batch | 9.5000 | step 2, 512 tokens |",
        "| tokens, train | 7,000 |",
        "| train.max_lr | 0.0006 |",
        r"| train.text | a \| b |",
    ):
        assert line in card.splitlines(), line
    assert "ODC-By 1.0" in card
    assert Manifest(GPT2_TOKENIZER.encoding, SOURCE, ()).source["revision"] in card
    assert 'from_pretrained("models")' in card
    assert "dvc repro" in card
    assert write_card(tmp_path / "two") == card, "equal inputs give equal bytes"


def test_licences_by_source() -> None:
    assert "BSD-3-Clause" in licence({"kind": "docs"})
    assert "whoever trained" in licence({"kind": "local"})
    assert "huggingface.co/datasets/a/b" in licence({"kind": "hub", "repo": "a/b"})


def test_every_number_of_the_metrics_is_a_row() -> None:
    nested = {"a": {"b": {"value": 0.5}, "c": 3}, "d": "text", "e": True, "examples": 5}
    assert list(evaluation_rows(nested)) == [("a.b", "0.5000", ""), ("a.c", "3", ""),]  # fmt: skip
    harness = {"acc": 0.5, "acc_stderr": 0.25, "version": 1.0, "examples": 100, "examples_in_all": 2105, "limit": 100}
    assert list(evaluation_rows(harness)) == [
        ("acc", "0.5000 ± 0.2500", "version 1.0, the first 100 of 2,105 examples")
    ]
    whole = {**harness, "examples_in_all": 100}
    assert list(evaluation_rows(whole)) == [("acc", "0.5000 ± 0.2500", "version 1.0, 100 examples")]


@pytest.fixture
def checkout(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose models/ and reports/ are those of its dvc.lock, everything committed; a user with a token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write_card(here)
    (here / "reports/loss.png").write_bytes(b"a picture")
    (here / "reports/items.npz").write_bytes(b"not for the hub")
    md5s = {name: _folder_md5(Path(name), _sums(Path(name))) for name in ("models", "reports")}
    stages = {
        "train": {"outs": [{"path": "models", "md5": md5s["models"]}]},
        "evaluate": {
            "deps": [{"path": "models", "md5": md5s["models"]}],
            "outs": [{"path": "reports", "md5": md5s["reports"]}],
        },
    }
    (here / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    (here / ".dvc").mkdir()
    (here / ".dvc/config").write_text("")
    (here / ".gitignore").write_text("/models/\n/curves/\n/reports/\n/.dvc/tmp\n")
    git("init", "--quiet")
    git("add", "--all")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "the run")
    return here


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the hub's client, of its own HTTP library
def test_the_hub_gets_the_model_the_card_and_the_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with FakeHub(token=TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert main(["publish", "--repo", REPO, "--private", "--licence", "mit"]) == 0
        files = hub.uploaded[REPO]
        assert hub.private == {REPO: True}
        assert set(files) == {"README.md", "config.json", "model.safetensors", "recipe.json", "loss.png"}
        assert files["model.safetensors"] == b"weights"
        card = files["README.md"].decode()
        front = yaml.safe_load(card.split("---\n")[1])
        assert front["license"] == "mit"
        assert git("rev-parse", "HEAD") in card
        assert f'from_pretrained("{REPO}")' in card
        assert '"models"' not in card
        hub.commit_status = 403
        assert main(["publish", "--repo", REPO]) == 1
    said = capfd.readouterr()
    assert f"{REPO} is at {hub.url}/{REPO}" in said.out
    assert f"the hub refused {REPO}" in said.err
    assert TOKEN not in said.out + said.err + card
    assert main(["publish", "--repo", REPO]) == 1, "the hub is gone"
    assert "cannot be reached" in capfd.readouterr().err
    assert not list(checkout.glob(".publish-*"))


def test_the_fine_tuned_model_is_published_with_its_own_card(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", "--repo", REPO, "--chat", "--out", "look"]) == 1
    assert "chat/model/model.safetensors does not exist, so there is no model to publish" in capfd.readouterr().err
    (checkout / "chat/model").mkdir(parents=True)
    (checkout / "chat/model/model.safetensors").write_bytes(b"tuned")
    (checkout / "chat/manifest.json").write_text("{}")
    (checkout / "reports/chat_card.md").write_text(f"---\ntags: []\n---\n\n{CHAT_FROM}\n\n{REPRODUCE}\n")
    lock = yaml.safe_load((checkout / "dvc.lock").read_text())
    md5s = {name: _folder_md5(Path(name), _sums(Path(name))) for name in ("chat", "reports")}
    lock["stages"]["finetune"] = {"outs": [{"path": "chat", "md5": md5s["chat"]}]}
    lock["stages"]["evaluate"]["deps"].append({"path": "chat", "md5": md5s["chat"]})
    lock["stages"]["evaluate"]["outs"] = [{"path": "reports", "md5": md5s["reports"]}]
    (checkout / "dvc.lock").write_text(yaml.safe_dump(lock))
    (checkout / ".gitignore").write_text("/models/\n/curves/\n/reports/\n/chat/\n/look/\n/.dvc/tmp\n")
    git("add", "--all")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "the chat")
    assert main(["publish", "--repo", REPO, "--chat", "--out", "look"]) == 0
    assert (checkout / "look/model.safetensors").read_bytes() == b"tuned"
    card = (checkout / "look/README.md").read_text()
    assert f'"{REPO}"' in card
    assert git("rev-parse", "HEAD") in card


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("page", [b"<html>", b"[]", b"{}", b'{"url": 1}', b"null", b""])
@pytest.mark.usefixtures("checkout")
def test_an_answer_that_is_not_the_hubs_is_said(
    page: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with FakeHub(token=TOKEN, page_for_uploads=page) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert main(["publish", "--repo", REPO]) == 1
    assert "does not answer as the hub does" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1", "needs the package socksio"),
        ("SSL_CERT_FILE", "/none", "SSL_CERT_FILE=/none cannot be read"),
        ("HF_TOKEN", "hf_ü", "HF_TOKEN has a character that cannot be sent"),
    ],
)
@pytest.mark.usefixtures("checkout")
def test_a_variable_that_cannot_work_is_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import close_session

    monkeypatch.setenv(name, value)
    close_session()
    assert main(["publish", "--repo", REPO]) == 1
    assert message in capfd.readouterr().err
    close_session()


def test_a_copy_to_look_at_needs_no_token(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    out = checkout.parent / f"{checkout.name}-look"
    assert main(["publish", "--repo", REPO, "--out", str(out)]) == 0
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert main(["publish", "--repo", REPO, "--out", str(out)]) == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: shutil.rmtree("models"), "there is no model to publish"),
        (lambda: Path("reports/model_card.md").unlink(), "there is no model card"),
        (lambda: Path("models/config.json").write_text("{}"), "models is not what dvc.lock says"),
        (lambda: Path("params.yaml").write_text("x: 1"), "changes that are not committed"),
        (lambda: Path("dvc.lock").write_text(f"{Path('dvc.lock').read_text()}\n"), "changes that are not committed"),
        (lambda: Path("metrics").mkdir() or Path("metrics/train.json").touch(), "changes that are not committed"),
        (lambda: shutil.rmtree(".git"), "fatal: not a git repository"),
        (lambda: shutil.rmtree(".git") or git("init"), "git has no commit of this folder"),
        (lambda: other_model(), "describes another model"),
        (lambda: Path("dvc.lock").unlink(), "models is not an out of dvc.lock"),
    ],
    ids=["no model", "no card", "edited", "dirty", "lock", "metrics", "no git", "no commit", "other model", "no lock"],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(
    checkout: Path,  # noqa: ARG001
    spoil: Callable[[], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil()
    assert main(["publish", "--repo", REPO]) == 1
    assert message in capsys.readouterr().err


def other_model() -> None:
    lock = yaml.safe_load(Path("dvc.lock").read_text())
    lock["stages"]["evaluate"]["deps"][0]["md5"] = "0" * 32 + ".dir"
    Path("dvc.lock").write_text(yaml.safe_dump(lock))


def test_without_a_token_or_a_network_nothing_is_tried(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(checkout / "no-such-file"))
    assert main(["publish", "--repo", REPO]) == 1
    assert "set HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["publish", "--repo", REPO]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
