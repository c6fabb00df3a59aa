"""Models of the hub as OWNER/NAME@COMMIT: fetched, verified, recorded, measured and trained from; and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, flip
from small_corpus import make_texts, write_jsonl
from small_params import PARAMS, ROTARY, write_params
from small_project import Project
from small_vocabulary import TOKENIZER
from test_corpus_hub import point_at

from pipelib.corpus.baselines import hub_model_files, write_baselines
from pipelib.corpus.hub_transfer import Retry
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.published_models import folder_name, is_downloaded, is_hub_model
from pipelib.errors import UserError
from pipelib.evaluation.baselines import find_baselines
from pipelib.files import read_json, sha256_file
from pipelib.model import weights as weights_module
from pipelib.model.decoder import build
from pipelib.model.huggingface import export_model
from pipelib.model.params import InitialisedModelParams, family_params
from pipelib.params import Params
from pipelib.schema import parse
from pipelib.training.inputs import find_initial_weights, require_weights

COMMIT = "c" * 40
NAME = f"Someone/Tiny-0.1B@{COMMIT}"
ONCE = Retry(attempts=1)
SHAPE = {key: value for key, value in ROTARY.items() if key != "init_from"}


def files_of(root: Path, max_shard_size: str = "1GB") -> dict[str, bytes]:
    """A small Qwen3 as transformers saves it, with its vocabulary, and files that no model needs."""
    import transformers

    model = build(family_params("qwen3")(**SHAPE), TOKENIZER.size)
    model.initialise(5)
    export_model(model, TOKENIZER, root / "ours", {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(root / "ours")
    theirs.to(torch.bfloat16).save_pretrained(root / "theirs", max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "theirs" / name).write_bytes((root / "ours" / name).read_bytes())
    found = {path.name: path.read_bytes() for path in (root / "theirs").iterdir()}
    return {**found, "README.md": b"# Tiny", "original/consolidated.00.pth": b"weights of another program"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(tmp_path_factory.mktemp("made"), "20KB")


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub("Someone/Tiny-0.1B", COMMIT, {**files}, kind="model") as fake:
        point_at(fake.url, monkeypatch)
        yield fake


def write(names: list[str], folder: Path) -> dict[str, Any]:
    def no_fetch(_: object) -> Any:
        raise AssertionError("only OpenAI's models are pinned in the code")

    return write_baselines(names, folder, no_fetch, ONCE)


def test_a_model_is_fetched_recorded_and_read(hub: FakeHub) -> None:
    folder = weights_module.MODELS / folder_name(NAME)
    manifest = write([NAME], weights_module.MODELS)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert not {"README.md", "original", "consolidated.00.pth"} & names
    parts = sorted(name for name in names if name.endswith(".safetensors"))
    assert len(parts) > 1
    entry = manifest[NAME]
    assert (entry["repo"], entry["revision"]) == ("Someone/Tiny-0.1B", COMMIT)
    assert entry["files"] == {name: sha256_file(folder / name) for name in names}
    assert entry["bytes"] == sum(len(hub.files[name]) for name in parts)
    # as a baseline, and as initial weights
    (baseline,) = find_baselines([NAME], TOKENIZER)
    assert (baseline.name, baseline.sha256, baseline.tokenizer) == (NAME, entry["sha256"], TOKENIZER)
    section = parse(InitialisedModelParams, {"architecture": "qwen3", **ROTARY, "init_from": NAME}, "model", [])
    assert section is not None
    assert section.init_is_published
    found = find_initial_weights(section)
    assert (Path(found.folder), found.sha256) == (folder, entry["sha256"])
    assert require_weights(section, TOKENIZER) == ""
    before = len(hub.requests)
    hub_model_files(NAME, ONCE)
    assert len(hub.requests) == before  # the list is stored

    (folder / parts[0]).write_bytes(hub.files[parts[0]][:-1] + b"x")
    with pytest.raises(UserError, match=r"is not the file that data/models/manifest\.json names"):
        find_initial_weights(section)
    with pytest.raises(UserError, match=r"is not the file that data/models/manifest\.json names"):
        find_baselines([NAME], TOKENIZER)


def test_a_file_that_is_not_what_the_hub_lists_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [flip] * 50
    with pytest.raises(UserError, match="its hash differs from the hub's list"):
        write([NAME], tmp_path / "models")
    assert not (tmp_path / "models/manifest.json").exists()


def test_a_repository_without_weights_that_can_be_read_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    for name in [name for name in hub.files if name.endswith(".safetensors")]:
        del hub.files[name]
    with pytest.raises(UserError, match=r"has no config\.json with weights beside it"):
        write([NAME], tmp_path / "models")


def test_names() -> None:
    assert is_hub_model(NAME)
    assert is_downloaded("gpt2")
    for name in ("gpt2", "a/b", "./a/b@" + COMMIT, "a/b@main", "a/b/c@" + COMMIT, f"a/../b@{COMMIT}"):
        assert not is_hub_model(name)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("download", {"models": ["Someone/Tiny"]}, "models[0]: 'Someone/Tiny' is not pinned"),
        ("download", {"models": ["Someone/Tiny@main"]}, "'Someone/Tiny@main' is not pinned"),
        ("download", {"models": ["gpt-2"]}, "models[0]: 'gpt-2' is not one of gpt2"),
        ("evaluate", {"baselines": [NAME]}, f"{NAME} is not in download.models"),
        ("model", {"init_from": NAME}, f"{NAME} needs weights from the hub, and download.models = [] does not name it"),
    ],
)
def test_parameters_that_do_not_fit(section: str, changes: dict[str, Any], message: str) -> None:
    values = json.loads(json.dumps(PARAMS))
    values[section].update(changes)
    problems: list[str] = []
    if section == "download":
        parse(DownloadParams, values[section], section, problems)
    else:
        parse(Params, values, "", problems)
    assert any(message in problem for problem in problems), problems


@pytest.mark.long
def test_every_stage_works_with_a_model_of_the_hub(tmp_path: Path) -> None:
    """It is fetched, its vocabulary makes the data, training starts from it, and it is measured beside the result."""
    project = Project.make(tmp_path / "project")
    write_jsonl(project.root / "texts/a.jsonl", make_texts(200, words=60))
    with FakeHub("Someone/Tiny-0.1B", COMMIT, files_of(tmp_path / "made"), kind="model") as hub:
        write_params(project.root, download__models=[NAME])
        project.runs("download", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
    write_params(
        project.root, download__models=[NAME], vocabulary__source=f"./data/models/{folder_name(NAME)}",
        model={"architecture": "qwen3", **ROTARY, "init_from": NAME}, evaluate__baselines=[NAME],
    )  # fmt: skip
    for stage in ("vocabulary", "tokenize", "train", "evaluate"):
        project.runs(stage)
    recipe = read_json(project.root / "models/recipe.json")
    sha256 = read_json(project.root / "data/models/manifest.json")[NAME]["sha256"]
    assert recipe["initial_weights_sha256"] == sha256
    assert NAME in read_json(project.root / "metrics/evaluate.json")["baselines"]
