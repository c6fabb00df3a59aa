"""The whole download stage against a hub on this machine: secrets, what a change re-fetches, and how much disk it takes."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fake_hub import FakeHub
from small_corpus import make_texts, write_jsonl
from small_params import write_params
from small_project import Project
from test_corpus_hub import parquet_bytes
from test_dvc import Clone

REPO, REVISION, FOLDER = "someone/corpus", "a" * 40, "sample/tiny"
CANARY = "hf_canaryCanaryCANARYcanary"
SOURCE = {
    "download__source": "hub",
    "download__repo": REPO,
    "download__revision": REVISION,
    "download__folder": FOLDER,
    "download__benchmarks": [],
    "download__benchmark_documents": 0,
}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """Three files of 1 MB that do not compress."""
    files = {
        f"{FOLDER}/{number:03d}_00000.parquet": parquet_bytes(
            text=[random.Random(1000 * number + row).randbytes(5000).hex() for row in range(100)], id=[None] * 100
        )
        for number in range(3)
    }
    with FakeHub(REPO, REVISION, files) as fake:
        yield fake


def environment(hub: FakeHub, home: Path) -> dict[str, str]:
    # an evaluation in this process may have gone offline
    return {"HF_ENDPOINT": hub.url, "HF_TOKEN": CANARY, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


def holders(root: Path, secret: str) -> list[Path]:
    """The files that hold a secret."""
    return [path for path in root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_the_token_is_nowhere_whether_the_stage_ends_well_or_not(
    hub: FakeHub, tmp_path: Path, empty_database: Path
) -> None:
    project = Project.make(tmp_path / "project")
    shutil.copy(empty_database, project.root)
    variables = environment(hub, tmp_path / "home")
    write_params(project.root, **SOURCE, logging__mlflow=True)
    hub.token = "hf_another"
    assert CANARY not in project.refuses("download", "HTTP 401 Unauthorized", "set HF_TOKEN", **variables)
    write_params(project.root, **SOURCE)  # MLflow takes seconds to import, and has what the record has
    hub.token = CANARY
    hub.failures, hub.retry_after = [500] * 1000, "0"
    assert CANARY not in project.refuses("download", "in 8 attempts (HTTP 500", **variables)
    hub.failures = [401]
    assert CANARY not in project.refuses("download", "HTTP 401 Unauthorized", **variables)
    hub.failures = [503, 429]
    write_params(project.root, **SOURCE, logging__mlflow=True)
    done = project.stage("download", **variables)
    assert done.returncode == 0, done.stderr
    assert CANARY not in done.stdout + done.stderr
    with closing(sqlite3.connect(project.root / "mlflow.db")) as database:
        ends = [status for (status,) in database.execute("select status from runs where name = 'download'")]
    assert ends == ["FINISHED"]  # one run of MLflow, which goes on
    assert "data/raw/002_00000.parquet" in project.files()
    assert holders(tmp_path, CANARY) == []


@pytest.mark.dvc
def test_the_corpus_is_on_the_disk_once(hub: FakeHub, tmp_path: Path) -> None:
    clone = Clone(tmp_path / "clone")
    clone.start_stages_warm()
    clone.environment |= environment(hub, tmp_path / "hub home")
    write_params(clone.root, **SOURCE)
    clone.dvc("repro", "download")
    requests = len(hub.requests)
    inodes: dict[int, int] = {}
    for folder in ("data", ".pipelib", ".dvc/cache"):
        for path in (clone.root / folder).rglob("*"):
            if path.is_file():
                inodes[path.stat().st_ino] = path.stat().st_size
    corpus = sum(map(len, hub.files.values()))
    assert corpus <= sum(inodes.values()) < 1.02 * corpus
    write_params(clone.root, **{**SOURCE, "download__max_tokens": 250_000})
    assert "Running stage 'download'" in clone.dvc("repro", "download")
    assert len(hub.requests) == requests
    names = [path.name for path in sorted((clone.root / "data/raw").iterdir())]
    assert names == ["000_00000.parquet", "manifest.json"]


def test_conversations_are_fetched_beside_the_corpus_and_change_nothing_of_it(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "project")
    write_jsonl(project.root / "texts/a.jsonl", make_texts(40))
    project.runs("download")
    before = (project.root / "data/raw/manifest.json").read_bytes()
    assert (project.root / "data/conversations/manifest.json").read_text() == "{}\n"
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    with FakeHub("someone/talk", REVISION, {"train.jsonl": row * 3}) as hub:
        variables = environment(hub, tmp_path / "home")
        chosen = {"repo": "someone/talk", "revision": REVISION, "folder": ""}
        write_params(project.root, download__conversations={**chosen, "revision": "main"})
        project.refuses("download", "download.conversations.revision: 'main' is not a commit", **variables)
        write_params(project.root, download__conversations=chosen)
        project.runs("download", **variables)
    assert (project.root / "data/conversations/train.jsonl").read_bytes() == row * 3
    assert (project.root / "data/raw/manifest.json").read_bytes() == before
