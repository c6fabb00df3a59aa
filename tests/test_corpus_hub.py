"""The hub source: the real client against a hub on this machine that misbehaves."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import FakeHub

from pipelib.corpus.benchmarks import hellaswag_items
from pipelib.corpus.download import download
from pipelib.corpus.hub import HELLASWAG, HubSource, Retry, hub_files
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.raw import iterate_raw, write_manifest
from pipelib.errors import UserError
from pipelib.state import State, lock_folder

REPO, REVISION, FOLDER = "someone/corpus", "a" * 40, "sample/tiny"
QUICK = Retry(attempts=4, first_wait=0.0)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store is."""
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def parquet_bytes(**columns: list[object]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    files = {
        f"{FOLDER}/{number:03d}_00000.parquet": parquet_bytes(text=[f"text {number}-{row}" for row in range(3)])
        for number in range(3)
    }
    files |= {f"{FOLDER}/README.md": b"no parquet", "other/000_00000.parquet": b"elsewhere"}
    with FakeHub(REPO, REVISION, files) as fake:
        point_at(fake.url, monkeypatch)
        yield fake


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do to the imported client what HF_ENDPOINT does at import, and make its own waits short."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # noqa: ARG005


def source(**changes: str) -> HubSource:
    return dataclasses.replace(HubSource(REPO, REVISION, FOLDER, QUICK), **changes)  # type: ignore[arg-type]


def test_files_arrive_unchanged_and_in_order(hub: FakeHub, tmp_path: Path) -> None:
    written = source().write(tmp_path / "raw", tmp_path / "work")
    assert [file.name for file in written.files] == ["000_00000.parquet", "001_00000.parquet", "002_00000.parquet"]
    for file in written.files:
        content = (tmp_path / "raw" / file.name).read_bytes()
        assert content == hub.files[f"{FOLDER}/{file.name}"]
        assert file.sha256 == hashlib.sha256(content).hexdigest()
    write_manifest(tmp_path / "raw", source().identity(), written.files)
    assert [row["text"] for row in iterate_raw(tmp_path / "raw")][:4] == [
        "text 0-0",
        "text 0-1",
        "text 0-2",
        "text 1-0",
    ]
    assert len(hub.gets()) == 3


def test_what_is_there_and_right_is_not_fetched_again(hub: FakeHub, tmp_path: Path) -> None:
    source().write(tmp_path / "raw", tmp_path / "work")
    (damaged,) = (tmp_path / "state").rglob("001_00000.parquet")
    damaged.unlink()  # it is a hard link of the out
    damaged.write_bytes(b"cut short")
    stale = damaged.with_name("x.incomplete")
    stale.write_bytes(b"left by a kill")
    source().write(tmp_path / "again", tmp_path / "work")
    assert len(hub.gets()) == 4
    assert (tmp_path / "again/001_00000.parquet").read_bytes() == hub.files[f"{FOLDER}/001_00000.parquet"]
    assert not stale.exists()


@pytest.mark.parametrize("status", [503, 500, 429, 408])
def test_a_passing_failure_is_tried_again(hub: FakeHub, tmp_path: Path, status: int) -> None:
    hub.failures = [status, status]
    written = source().write(tmp_path / "raw", tmp_path / "work")
    assert len(written.files) == 3
    assert len(hub.gets()) == 5


def test_a_flipped_bit_is_found_and_fetched_again(
    hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.flips = 1
    source().write(tmp_path / "raw", tmp_path / "work")
    assert len(hub.gets()) == 4
    for path in (tmp_path / "raw").iterdir():
        assert path.read_bytes() == hub.files[f"{FOLDER}/{path.name}"]
    assert "SHA-256" in capfd.readouterr().out


def test_bytes_that_stay_wrong_end_in_an_error_and_are_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.flips = 1000
    with pytest.raises(UserError, match=r"could not be downloaded in 4 attempts \(its bytes are not those"):
        source().write(tmp_path / "raw", tmp_path / "work")
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_hub_that_stays_broken_ends_in_an_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.failures = [503] * 1000
    with pytest.raises(UserError, match=r"in 4 attempts \(HTTP 503 Service Unavailable\).*verified files are kept"):
        source().write(tmp_path / "raw", tmp_path / "work")


def test_a_hub_that_is_never_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UserError, match=r"could not be downloaded in 2 attempts \(.*Connect.*\)"):
        HubSource(REPO, REVISION, FOLDER, Retry(attempts=2, first_wait=0.0)).write(tmp_path / "raw", tmp_path / "work")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "b" * 40}, "download.revision does not exist"),
        ({"folder": "sample/none"}, "look at download.folder"),
        ({"repo": "someone/else"}, "download.repo"),
    ],
)
def test_what_does_not_exist_ends_at_once(hub: FakeHub, tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(**changes).write(tmp_path / "raw", tmp_path / "work")
    assert len(hub.requests) == 1


def test_a_folder_without_parquet(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["docs/readme.txt"] = b"text"
    with pytest.raises(UserError, match="holds no parquet file"):
        source(folder="docs").write(tmp_path / "raw", tmp_path / "work")


def test_a_refused_token_is_not_repeated_in_the_message(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.token = "another"
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(UserError, match="set HF_TOKEN") as caught:
        source().write(tmp_path / "raw", tmp_path / "work")
    captured = capfd.readouterr()
    assert "hf_canary" not in str(caught.value) + captured.out + captured.err
    assert len(hub.requests) == 1


def test_the_token_opens_a_private_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_canary"
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert len(source().write(tmp_path / "raw", tmp_path / "work").files) == 3


def parameters(**changes: object) -> DownloadParams:
    values = DownloadParams("hub", "", "", REPO, REVISION, FOLDER, ("completion",), 4, 1)
    return dataclasses.replace(values, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "code"), [({"benchmarks": ()}, "one"), ({"benchmark_documents": 5}, "one"), ({}, "another")]
)
def test_other_benchmarks_and_other_code_fetch_no_text_again(
    hub: FakeHub, here: Path, changes: dict[str, object], code: str
) -> None:
    for number in range(3):
        texts = [" ".join(f"d{number}{row}w{word}" for word in range(99)) for row in range(3)]
        hub.files[f"{FOLDER}/{number:03d}_00000.parquet"] = parquet_bytes(text=texts, id=[None] * 3)

    def run(params: DownloadParams, code: str) -> State:
        with State(
            "download", {"benchmarks": params.benchmarks, "count": params.benchmark_documents}, {"c": code}
        ) as state:
            assert not state.finished
            download(params, source(), state.work / "outs", state.work)
            state.finish()
            state.publish()
        return state

    run(parameters(), "one")
    assert len(hub.gets()) == 3
    before = len(hub.requests)
    final = run(parameters(**changes), code).final
    assert [line for line in hub.requests[before:] if "/resolve/" in line] == []
    (stored,) = (here / "state/hub/someone--corpus" / REVISION).rglob("000_00000.parquet")
    assert stored.samefile(final / "data/raw/000_00000.parquet")
    assert stored.samefile(here / "data/raw/000_00000.parquet")


def test_a_second_run_waits_for_the_store(hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = lock_folder(tmp_path / "state/hub/someone--corpus" / REVISION)
    second = threading.Thread(target=source().write, args=(tmp_path / "raw", tmp_path / "work"))
    second.start()
    while "waiting for it" not in capfd.readouterr().out:
        second.join(0.01)
    assert hub.gets() == []
    os.close(lock)
    second.join()
    assert len(hub.gets()) == 3


def test_hf_endpoint_is_respected(hub: FakeHub, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipelib.corpus.hub import HubSource\n"
        f"HubSource({REPO!r}, {REVISION!r}, {FOLDER!r}).write(Path('raw'), Path('work'))\n"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert len(list((tmp_path / "raw").iterdir())) == 3
    assert not (tmp_path / ".cache").exists()


def test_no_space_is_said_before_anything_is_fetched(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))  # noqa: ARG005
    with pytest.raises(UserError, match=r"the download needs .* 10 B free"):
        source().write(tmp_path / "raw", tmp_path / "work")
    assert not hub.gets()


def test_download_count_is_checked(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_DOWNLOADS", "many")
    with pytest.raises(UserError, match="PIPELIB_DOWNLOADS=many"):
        source().write(tmp_path / "raw", tmp_path / "work")
    assert not hub.gets()


def test_waits_grow_vary_and_heed_the_server() -> None:
    retry = Retry(first_wait=1.0, longest_wait=10.0)
    assert 0.5 <= retry.seconds(1, None) <= 1.5
    assert 2.0 <= retry.seconds(3, None) <= 6.0
    assert retry.seconds(30, None) <= 15.0
    assert retry.seconds(1, 7.0) == 7.0
    assert retry.seconds(1, 3600.0) == 10.0


def test_hellaswag_keeps_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet_bytes(
        ind=[24],
        activity_label=["Roof shingle removal"],
        ctx_a=["A man is sitting on a roof."],
        ctx_b=["he"],
        ctx=["A man is sitting on a roof. he"],
        endings=[["is using wrap.", "is ripping tiles.", "holds a cube.", "starts pulling."]],
        source_id=["activitynet~v_-JhWjGDPHMY"],
        split=["val"],
        split_type=["indomain"],
        label=["3"],
    )
    digest = hashlib.sha256(content).hexdigest()
    file = dataclasses.replace(HELLASWAG, bytes=len(content), sha256=digest)
    with FakeHub(file.repo, file.revision, {file.path: content}) as fake:
        point_at(fake.url, monkeypatch)
        for _ in range(2):
            with hub_files([file], QUICK) as (path,):
                assert path.read_bytes() == content
        assert len(fake.gets()) == 1
    (item,) = hellaswag_items(path)
    assert item["label"] == 3
    assert item["document"] is None
    assert json.dumps(item)
