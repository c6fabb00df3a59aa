"""The hub source: the real client against a hub on this machine that misbehaves."""

import dataclasses
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import Answer, FakeHub, cut, entry_of, flip, stall
from small_params import PARAMS
from small_project import hold
from test_corpus_kinds import PLANTED, plant

from pipelib.corpus import hub_transfer
from pipelib.corpus.benchmarks import hellaswag_items, hub_rows
from pipelib.corpus.download import download, download_inputs
from pipelib.corpus.hub_benchmarks import HUB_BENCHMARKS
from pipelib.corpus.hub_lists import HubFolder, HubPin
from pipelib.corpus.hub_store import fetch_pinned
from pipelib.corpus.hub_transfer import HubRepo, Retry
from pipelib.corpus.params import DownloadParams
from pipelib.corpus.parquet import iterate_raw
from pipelib.corpus.raw import write_manifest
from pipelib.corpus.sources.hub import HubSource
from pipelib.corpus.sources.local import LocalSource
from pipelib.errors import UserError
from pipelib.files import sha256_file
from pipelib.workspace.workdir import WorkDir

REPO, REVISION, FOLDER = "someone/corpus", "a" * 40, "sample/tiny"
QUICK = Retry(attempts=4, first_wait=0.0)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the store is."""
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    return tmp_path / "state"


def parquet_bytes(**columns: Any) -> bytes:
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
    """Do to the imported client what HF_ENDPOINT does at import."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def source(**changes: object) -> HubSource:
    return dataclasses.replace(HubSource(REPO, REVISION, FOLDER, retry=QUICK), **changes)  # type: ignore[arg-type]


def test_files_arrive_unchanged_and_in_order(hub: FakeHub, tmp_path: Path) -> None:
    written = source().write(tmp_path / "raw", tmp_path / "work")
    assert [file.name for file in written.files] == ["000_00000.parquet", "001_00000.parquet", "002_00000.parquet"]
    for file in written.files:
        content = (tmp_path / "raw" / file.name).read_bytes()
        assert content == hub.files[f"{FOLDER}/{file.name}"]
        assert file.sha256 == hashlib.sha256(content).hexdigest()
    write_manifest(tmp_path / "raw", source().identity(), written)
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
    source().write(tmp_path / "again", tmp_path / "work")
    assert len(hub.gets()) == 4
    assert (tmp_path / "again/001_00000.parquet").read_bytes() == hub.files[f"{FOLDER}/001_00000.parquet"]


FILE = f"{FOLDER}/000_00000.parquet"
LIST = f"GET /api/datasets/{REPO}/tree/{REVISION}/{FOLDER}"
NAMES = f"GET /api/datasets/{REPO}/revision/{REVISION}"
GET = f"GET /datasets/{REPO}/resolve/{REVISION}/{FILE}"
END = f"{GET} in part"
ASKED = [LIST, NAMES, END]
"""What a run asks before it fetches files: the list, the names to compare it with, and the end of the first file."""


@pytest.fixture
def one_file(hub: FakeHub) -> bytes:
    """The hub's corpus as one file, large enough to be cut in the middle."""
    content = parquet_bytes(text=[random.Random(row).randbytes(500).hex() for row in range(300)])
    for name in [name for name in hub.files if name.startswith(FOLDER)]:
        del hub.files[name]
    hub.files[FILE] = content
    return content


def fetch(folder: Path) -> bytes:
    source().write(folder, folder)
    return (folder / "000_00000.parquet").read_bytes()


def no_partial_is_left(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.suffix in (".part", ".incomplete", ".tmp")]


@pytest.mark.parametrize("status", [500, 502, 503, 408, 429])
def test_a_passing_failure_is_tried_again(hub: FakeHub, one_file: bytes, tmp_path: Path, status: int) -> None:
    hub.failures = [status, status]
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [*ASKED, GET, GET, GET]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_list_that_fails_is_asked_for_again(hub: FakeHub, one_file: bytes, tmp_path: Path, status: int) -> None:
    hub.lists_broken = [status, status]
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [LIST, LIST, *ASKED, GET]


@pytest.mark.parametrize("when", ["0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_the_server_says_how_long_to_wait(hub: FakeHub, one_file: bytes, tmp_path: Path, when: str) -> None:
    hub.failures, hub.retry_after = [429, 503, 429], when
    slow = dataclasses.replace(source(), retry=Retry(attempts=4, first_wait=1000.0, max_wait=1000.0))
    slow.write(tmp_path / "raw", tmp_path)
    assert (tmp_path / "raw/000_00000.parquet").read_bytes() == one_file
    assert hub.requests == [*ASKED, GET, GET, GET, GET]


def test_a_date_to_wait_for_is_understood() -> None:
    later = datetime.now(UTC) + timedelta(seconds=30)
    response = SimpleNamespace(headers={"Retry-After": format_datetime(later, usegmt=True)})
    wish = hub_transfer._retry_after(SimpleNamespace(response=response))  # type: ignore[arg-type]
    assert wish is not None
    assert 20 < wish <= 30


def test_a_connection_that_is_cut_goes_on_where_it_ended(hub: FakeHub, one_file: bytes, tmp_path: Path) -> None:
    hub.faults = [cut(1000), cut(5000)]
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [*ASKED, GET, GET, GET]
    assert hub.starts == [0, 1000, 6000]
    assert hub.sent == len(one_file)


def test_an_attempt_that_brought_bytes_starts_the_count_again(hub: FakeHub, one_file: bytes, tmp_path: Path) -> None:
    hub.faults = [cut(100) for _ in range(20)]
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [*ASKED, *[GET] * 21]
    assert hub.sent == len(one_file)


def test_attempts_that_bring_nothing_end(hub: FakeHub, one_file: bytes, tmp_path: Path) -> None:
    hub.faults = [cut(100), *(cut(0) for _ in range(9))]
    with pytest.raises(UserError, match=r"could not be downloaded in 4 attempts .*which resumes the download"):
        fetch(tmp_path / "raw")
    assert hub.requests == [*ASKED, *[GET] * 4]
    assert hub.starts == [0, 100, 100, 100]
    hub.faults = []
    assert fetch(tmp_path / "raw") == one_file
    assert hub.starts[4:] == [100]


def test_a_stall_goes_on_after_the_timeout(
    hub: FakeHub, one_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.faults = [stall(2000)]
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [*ASKED, GET, GET]
    assert hub.starts == [0, 2000]


def test_a_list_that_never_comes_is_asked_for_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.lists_broken = [0]
    assert len(source().identity()["files"]) == 3
    assert hub.requests == [LIST, LIST, NAMES]


def test_a_server_without_ranges_sends_the_file_again(hub: FakeHub, one_file: bytes, tmp_path: Path) -> None:
    hub.faults, hub.knows_ranges = [cut(1000)], False
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [*ASKED, GET, GET]
    assert hub.sent == 1000 + len(one_file)


def test_a_flipped_bit_is_found_and_fetched_again(
    hub: FakeHub, one_file: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [flip]
    assert fetch(tmp_path / "raw") == one_file
    assert hub.requests == [*ASKED, GET, GET]
    assert hub.starts == [0, 0]
    assert "its hash differs from the hub's list" in capfd.readouterr().out


@pytest.mark.usefixtures("one_file")
def test_bytes_that_stay_wrong_end_in_an_error_and_are_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults = [flip] * 1000
    with pytest.raises(UserError, match=r"could not be downloaded in 4 attempts \(its hash differs"):
        fetch(tmp_path / "raw")
    assert hub.requests == [*ASKED, *[GET] * 4]
    assert not list(tmp_path.rglob("*.parquet"))
    assert no_partial_is_left(tmp_path)


@pytest.mark.parametrize("change", [-100, 100])
def test_a_wrong_size_ends_in_an_error(hub: FakeHub, one_file: bytes, tmp_path: Path, change: int) -> None:
    hub.served[FILE] = one_file[:change] if change < 0 else one_file + bytes(change)
    message = f"in 4 attempts .its size is {len(one_file) + change} bytes, and the hub's list says {len(one_file)}"
    with pytest.raises(UserError, match=message):
        fetch(tmp_path / "raw")
    assert hub.requests == [*ASKED, *[GET] * 4]


def test_a_partial_file_that_is_longer_than_the_hubs_starts_again(
    hub: FakeHub, one_file: bytes, tmp_path: Path
) -> None:
    source().identity()
    part = tmp_path / f"state/hub/someone--corpus/{REVISION}/{FILE}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(one_file[:-10])
    hub.served[FILE] = one_file[:-20]
    with pytest.raises(UserError, match="could not be downloaded"):
        fetch(tmp_path / "raw")
    assert hub.starts[:2] == [len(one_file) - 10, 0]
    hub.served = {}
    part.write_bytes(one_file + b"of another file")
    assert fetch(tmp_path / "raw") == one_file
    assert hub.starts[-1] == 0


@pytest.mark.usefixtures("one_file")
def test_a_file_that_vanished_ends_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.vanished = {FILE}
    with pytest.raises(UserError, match=r"000_00000\.parquet .*404 Not Found.*no such folder or file"):
        fetch(tmp_path / "raw")
    assert hub.requests == ASKED


@pytest.mark.usefixtures("one_file")
def test_a_revision_that_is_gone_names_those_that_exist(hub: FakeHub, tmp_path: Path) -> None:
    source().identity()
    hub.revision = "b" * 40
    with pytest.raises(UserError, match=rf"download.revision does not exist.*there are {'b' * 40} \(main\)"):
        fetch(tmp_path / "raw")
    assert hub.requests == [*ASKED, f"GET /api/datasets/{REPO}/refs"]


@pytest.mark.usefixtures("one_file")
def test_a_hub_that_stays_broken_ends_in_an_error(hub: FakeHub, tmp_path: Path) -> None:
    hub.failures = [503] * 1000
    with pytest.raises(UserError, match=r"in 4 attempts \(HTTP 503 Service Unavailable\).*which resumes the download"):
        fetch(tmp_path / "raw")
    assert hub.requests == [*ASKED, *[GET] * 4]


def test_a_hub_that_is_never_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    send = huggingface_hub.get_session().__class__.send

    def count(client: object, request: Any, **options: Any) -> Any:
        tries.append(request.url.path)
        return send(client, request, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.get_session().__class__, "send", count)
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(
        UserError, match=r"could not be downloaded in 4 attempts \(no connection to 127\.0\.0\.1\).*HF_ENDPOINT"
    ):
        fetch(tmp_path / "raw")
    assert tries == [LIST.removeprefix("GET ")] * 4


@pytest.mark.parametrize(
    ("changes", "message", "requests"),
    [
        ({"revision": "b" * 40}, rf"download.revision does not exist.*there are {REVISION} \(main\)", 2),
        ({"folder": "sample/none"}, "check download.folder", 1),
        ({"repo": "someone/else"}, "download.repo", 1),
    ],
)
def test_what_does_not_exist_ends_at_once(
    hub: FakeHub, tmp_path: Path, changes: dict[str, str], message: str, requests: int
) -> None:
    with pytest.raises(UserError, match=message):
        source(**changes).write(tmp_path / "raw", tmp_path / "work")
    assert len(hub.requests) == requests


def test_a_folder_without_parquet(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["docs/readme.md"] = b"text"
    with pytest.raises(UserError, match="has no file that can be read"):
        source(folder="docs").write(tmp_path / "raw", tmp_path / "work")


def test_a_long_list_comes_in_pages(hub: FakeHub) -> None:
    hub.page = 2
    assert [file["path"] for file in source().identity()["files"]] == [
        f"{FOLDER}/{number:03d}_00000.parquet" for number in range(3)
    ]
    assert hub.requests == [LIST, LIST, NAMES]


def test_a_slash_at_the_end_of_the_folder_does_not_matter(hub: FakeHub) -> None:
    assert source(folder=f"{FOLDER}/").identity()["files"] == source().identity()["files"]
    assert hub.requests == [LIST, NAMES]


def test_a_list_cannot_name_what_lies_outside_of_the_folder(hub: FakeHub) -> None:
    entry = {"type": "file", "path": f"{FOLDER}/../../../../x.parquet", "size": 1, "lfs": {"oid": "0" * 64}}
    hub.listed, hub.files = Answer(json.dumps([entry]).encode()), {}
    with pytest.raises(UserError, match="has no file that can be read"):
        source().identity()
    assert hub.requests == [LIST, NAMES] * 2  # the second is for its subfolders


def test_the_list_is_part_of_the_identity_and_asked_for_once(hub: FakeHub, tmp_path: Path) -> None:
    identity = source().identity()
    assert identity["files"][0] == {
        "path": FILE,
        "bytes": len(hub.files[FILE]),
        "sha256": hashlib.sha256(hub.files[FILE]).hexdigest(),
    }
    assert source().identity() == identity
    assert hub.requests == [LIST, NAMES]
    for path in (tmp_path / "state").rglob("*.json"):
        path.write_text("[{")
    assert source().identity() == identity
    assert hub.requests == [LIST, NAMES] * 2


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_not_repeated_in_the_message(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], status: int
) -> None:
    hub.lists_broken = [status]
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(UserError, match="set HF_TOKEN") as caught:
        source().write(tmp_path / "raw", tmp_path / "work")
    captured = capfd.readouterr()
    assert "hf_canary" not in str(caught.value) + captured.out + captured.err
    assert hub.requests == [LIST]


def test_the_token_opens_a_private_repository(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_canary"
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    assert len(source().write(tmp_path / "raw", tmp_path / "work").files) == 3


def test_the_token_does_not_follow_a_redirect_to_another_host(
    hub: FakeHub, one_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with FakeHub(REPO, REVISION, hub.files) as storage:
        hub.redirect = storage.url
        storage.faults = [cut(1000)]
        assert fetch(tmp_path / "raw") == one_file
        assert storage.starts == [0, 1000]
        assert storage.authorized == [False, False, False]
    assert hub.authorized == [True] * 5


KILLED = """
import sys
from pathlib import Path
from pipelib.corpus.sources.hub import HubSource
HubSource(*sys.argv[1:4]).write(Path("raw"), Path("work"))
"""


def test_a_run_that_was_killed_goes_on_at_the_byte_where_it_stopped(
    hub: FakeHub, one_file: bytes, tmp_path: Path
) -> None:
    hub.faults = [stall(100_000)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, REPO, REVISION, FOLDER], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    part = tmp_path / f"state/hub/someone--corpus/{REVISION}/{FILE}.part"
    while not part.exists() or part.stat().st_size < 100_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert fetch(tmp_path / "again") == one_file
    assert hub.starts == [0, 100_000]
    assert hub.sent == len(one_file)
    assert hub.requests == [*ASKED, GET, END, GET]
    assert no_partial_is_left(tmp_path)


def test_stale_partial_files_go_and_others_stay(hub: FakeHub, tmp_path: Path) -> None:
    source().write(tmp_path / "raw", tmp_path / "work")
    folder = tmp_path / f"state/hub/someone--corpus/{REVISION}"
    (folder / ".cache").mkdir()
    (folder / "other").mkdir()
    stale = [folder / ".cache/x.incomplete", folder / f"{FILE}.part", folder / "other/gone.parquet.part"]
    for path in stale:
        path.write_bytes(b"left")
    wanted = f"{FOLDER}/001_00000.parquet"
    (folder / wanted).unlink()
    (folder / f"{wanted}.part").write_bytes(hub.files[wanted][:100])
    source().write(tmp_path / "again", tmp_path / "work")
    assert no_partial_is_left(folder)
    assert hub.starts == [0, 0, 0, 100]


def parameters(**changes: object) -> DownloadParams:
    hub = {"source": "hub", "repo": REPO, "revision": REVISION, "folder": FOLDER, "benchmark_documents": 4}
    values = DownloadParams(**{**PARAMS["download"], **hub, "benchmarks": ("completion",), "models": ()})
    return dataclasses.replace(values, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"benchmarks": (), "benchmark_documents": 0}, "one"),
        ({"benchmark_documents": 5}, "one"),
        ({"models": ("gpt2",)}, "one"),
        ({"max_tokens": 1500}, "one"),
        ({}, "another"),
    ],
)
def test_other_parameters_and_other_code_make_no_request(
    hub: FakeHub, here: Path, changes: dict[str, object], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "weights").write_bytes(b"weights")
    monkeypatch.setattr("pipelib.corpus.hub_store.fetch_pinned", lambda pin: nullcontext(here / "weights"))  # noqa: ARG005
    for number in range(3):
        texts = [" ".join(f"d{number}{row}w{word}" for word in range(99)) for row in range(3)]
        hub.files[f"{FOLDER}/{number:03d}_00000.parquet"] = parquet_bytes(text=texts, id=[None] * 3)

    def run(params: DownloadParams, code: str) -> WorkDir:
        origin = source(max_tokens=params.max_tokens)
        with WorkDir("download", download_inputs(params, origin), {"c": code}) as state:
            assert not state.finished
            download(params, origin, state.work / "outs", state.work)
            state.finish()
            state.publish()
        return state

    run(parameters(), "one")
    assert len(hub.requests) == 6
    final = run(parameters(**changes), code).final
    assert len(hub.requests) == 6
    (stored,) = (here / "state/hub/someone--corpus" / REVISION).rglob("000_00000.parquet")
    assert stored.samefile(final / "data/raw/000_00000.parquet")
    assert stored.samefile(here / "data/raw/000_00000.parquet")


def test_a_second_run_waits_for_the_store(hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = hold(tmp_path / "state/hub/someone--corpus" / REVISION)
    second = threading.Thread(target=source().write, args=(tmp_path / "raw", tmp_path / "work"))
    second.start()
    while "waiting for it" not in capfd.readouterr().out:
        second.join(0.01)
    assert hub.gets() == []
    lock.close()
    second.join()
    assert len(hub.gets()) == 3


def test_hf_endpoint_is_respected(hub: FakeHub, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import huggingface_hub.constants\n"
        "from pipelib.corpus.sources.hub import HubSource\n"
        "assert huggingface_hub.constants.HF_HUB_DISABLE_XET\n"
        f"HubSource({REPO!r}, {REVISION!r}, {FOLDER!r}).write(Path('raw'), Path('work'))\n"
        "assert 'torch' not in sys.modules"
    )
    hub.failures, hub.retry_after = [503, 429], "0"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert len(list((tmp_path / "raw").iterdir())) == 3
    assert not (tmp_path / ".cache").exists()
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if not line.startswith(("hub: someone/corpus", f"{FOLDER}/"))] == []
    assert hub.url not in done.stdout + done.stderr


def test_the_clients_own_download_takes_over_where_xet_is_opted_in(
    hub: FakeHub, one_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # noqa: ARG005
    hub.faults = [flip]
    assert fetch(tmp_path / "raw") == one_file
    assert [line for line in hub.requests if line.startswith("GET")] == [*ASKED, GET, GET]


def fill_cache(hub: FakeHub, cache: Path, *names: str) -> None:
    """Put files where the hub's client keeps what it downloaded: links to blobs."""
    for name in names:
        content = hub.files[name]
        blob = cache / "datasets--someone--corpus/blobs" / hashlib.sha256(content).hexdigest()
        link = cache / "datasets--someone--corpus/snapshots" / REVISION / name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(os.path.relpath(blob, link.parent))


def test_what_the_hubs_cache_has_is_linked(hub: FakeHub, tmp_path: Path) -> None:
    names = sorted(name for name in hub.files if name.startswith(FOLDER) and name.endswith(".parquet"))
    fill_cache(hub, tmp_path / "cache", *names[:2])
    (damaged,) = (tmp_path / "cache").rglob(f"snapshots/*/{names[1]}")
    damaged.resolve().write_bytes(b"not it")
    source().write(tmp_path / "raw", tmp_path / "work")
    assert len(hub.gets()) == 2
    (cached,) = (tmp_path / "cache").rglob(f"snapshots/*/{names[0]}")
    assert cached.resolve().samefile(tmp_path / "raw/000_00000.parquet")
    assert [(tmp_path / "raw" / Path(name).name).read_bytes() for name in names] == [hub.files[name] for name in names]


def test_offline_the_hubs_cache_is_the_corpus(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and neither the store nor the hub's cache has it"):
        source().identity()
    fill_cache(hub, tmp_path / "cache", FILE)
    identity = source().identity()
    assert [file["path"] for file in identity["files"]] == [FILE]
    assert "this could not be compared with the hub's list" in capfd.readouterr().out
    assert len(source().write(tmp_path / "raw", tmp_path / "work").files) == 1
    assert hub.requests == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert source().identity() != identity
    assert hub.requests == [LIST, NAMES]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"00[12]_00000\.parquet .*HF_HUB_OFFLINE is set"):
        source().write(tmp_path / "again", tmp_path / "work")
    assert hub.requests == [LIST, NAMES]


def test_files_downloaded_by_hand_are_a_local_corpus(hub: FakeHub, tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "token_count": row, "score": 3.5, "dump": "CC"} for row in range(3)]
    (tmp_path / "mine").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine/000_00000.parquet")
    written = LocalSource(tmp_path / "mine", "**/*").write(tmp_path / "raw", tmp_path / "work")
    write_manifest(tmp_path / "raw", {}, written)
    assert list(iterate_raw(tmp_path / "raw", ("text", "token_count", "score", "dump"))) == rows
    assert hub.requests == []


def test_no_space_is_said_before_anything_is_fetched(
    hub: FakeHub, one_file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = len(one_file) - 1
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))  # noqa: ARG005
    with pytest.raises(UserError, match=r"the download needs .* free, so it would fail half-way"):
        fetch(tmp_path / "raw")
    assert not hub.gets()
    part = tmp_path / f"state/hub/someone--corpus/{REVISION}/{FILE}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(one_file[:1])
    assert fetch(tmp_path / "raw") == one_file


def test_download_count_is_checked(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_DOWNLOADS", "many")
    with pytest.raises(UserError, match="PIPELIB_DOWNLOADS=many"):
        source().write(tmp_path / "raw", tmp_path / "work")
    assert not hub.gets()


def test_waits_grow_vary_and_heed_the_server() -> None:
    retry = Retry(first_wait=1.0, max_wait=10.0)
    assert 0.5 <= retry.seconds(1, None) <= 1.5
    assert 2.0 <= retry.seconds(3, None) <= 6.0
    assert retry.seconds(30, None) <= 15.0
    assert retry.seconds(1, 7.0) == 7.0
    assert retry.seconds(1, 3600.0) == 10.0


@pytest.fixture
def counted(hub: FakeHub) -> FakeHub:
    """Eight files of 100 documents, each document of 10 tokens and random text, so that all files are equally large."""
    del hub.files[FILE], hub.files[f"{FOLDER}/001_00000.parquet"], hub.files[f"{FOLDER}/002_00000.parquet"]
    for number in range(8):
        texts = [random.Random(1000 * number + row).randbytes(200).hex() for row in range(100)]
        hub.files[f"{FOLDER}/{number:03d}_00000.parquet"] = parquet_bytes(text=texts, token_count=[10] * 100)
    return hub


@pytest.mark.parametrize(
    ("max_tokens", "rows", "fetched"),
    [
        (1, [1], 1),
        (10, [1], 1),
        (11, [2], 1),
        (1000, [100], 1),
        (1001, [100, 1], 2),
        (4500, [100, 100, 100, 100, 50], 5),
        (8000, [100] * 8, 8),
        (9999, [100] * 8, 8),
    ],
)
def test_a_prefix_fetches_what_it_needs_and_no_more(
    counted: FakeHub, tmp_path: Path, max_tokens: int, rows: list[int], fetched: int
) -> None:
    written = source(max_tokens=max_tokens).write(tmp_path / "raw", tmp_path / "work")
    assert [file.rows for file in written.files] == rows
    assert written.counts == {"tokens_estimated": 10 * sum(rows)}
    assert len(counted.gets()) == fetched
    write_manifest(tmp_path / "raw", {}, written)
    assert len(list(iterate_raw(tmp_path / "raw"))) == sum(rows)
    assert sorted(path.name for path in (tmp_path / "raw").glob("*.parquet")) == [file.name for file in written.files]
    assert written.files[-1].sha256 == sha256_file(tmp_path / "raw" / written.files[-1].name)


def test_a_longer_prefix_fetches_what_is_new(counted: FakeHub, tmp_path: Path) -> None:
    first = source(max_tokens=1500)
    second = source(max_tokens=3500)
    assert first.identity() != second.identity()
    short = first.write(tmp_path / "short", tmp_path)
    assert len(counted.gets()) == 2
    long = second.write(tmp_path / "long", tmp_path)
    assert [file.sha256 for file in long.files[:2]] == [file.sha256 for file in short.files]
    assert len(counted.gets()) == 4
    first.write(tmp_path / "short again", tmp_path)
    assert len(counted.requests) == 7


def test_files_that_turn_out_not_to_be_needed_are_not_listed(counted: FakeHub, tmp_path: Path) -> None:
    texts = [random.Random(row).randbytes(200).hex() for row in range(100)]
    counted.files[f"{FOLDER}/001_00000.parquet"] = parquet_bytes(text=texts, token_count=[1000] * 100)
    written = source(max_tokens=3500).write(tmp_path / "raw", tmp_path / "work")
    assert [file.rows for file in written.files] == [100, 3]
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["000_00000.parquet", "001_00000.parquet"]
    assert len(counted.gets()) == 4


def test_more_than_there_is_takes_all_and_says_so(
    counted: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    params = parameters(max_tokens=10_000, benchmarks=(), benchmark_documents=0)
    result, _ = download(params, source(max_tokens=10_000), tmp_path / "outs", tmp_path)
    assert result["tokens_estimated"] == 8000
    assert len(counted.gets()) == 8
    assert "has about 8,000 tokens, fewer than 10,000; all of it is used" in capfd.readouterr().out


@pytest.mark.parametrize("max_tokens", [None, 100])
@pytest.mark.parametrize(
    ("columns", "message"),
    [({"text": pa.array([], pa.string())}, "gave no document"), ({"page": ["x"]}, "has no column `text`")],
)
def test_files_without_documents_are_refused(
    hub: FakeHub, tmp_path: Path, columns: dict[str, Any], message: str, max_tokens: int | None
) -> None:
    for name in [name for name in hub.files if name.startswith(FOLDER) and name.endswith(".parquet")]:
        hub.files[name] = parquet_bytes(**columns)
    params = parameters(max_tokens=max_tokens, benchmarks=(), benchmark_documents=0)
    with pytest.raises(UserError, match=message):
        download(params, source(max_tokens=max_tokens), tmp_path / "outs", tmp_path)


def hellaswag_bytes() -> bytes:
    return parquet_bytes(
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


def test_hellaswag_keeps_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    content = hellaswag_bytes()
    known = HUB_BENCHMARKS["hellaswag"]
    pin = HubPin(HubRepo(known.repo, known.revision), known.path, hashlib.sha256(content).hexdigest())
    with FakeHub(pin.repo.name, pin.repo.revision, {pin.path: content}) as fake:
        point_at(fake.url, monkeypatch)
        for _ in range(2):
            with fetch_pinned(pin, QUICK) as path:
                assert path.read_bytes() == content
        assert len(fake.requests) == 3
    (item,) = hellaswag_items(hub_rows(path))
    assert item["label"] == 3
    assert item["document"] is None
    assert json.dumps(item)


@pytest.mark.parametrize("sha256", [None, "right", "wrong"])
def test_a_pin_and_the_hubs_list_have_to_agree(monkeypatch: pytest.MonkeyPatch, sha256: str | None) -> None:
    repo = HubRepo("someone/weights", REVISION, "model")
    content = b"weights" * 100
    known = hashlib.sha256(content).hexdigest() if sha256 == "right" else sha256
    with FakeHub(repo.name, repo.revision, {"model.safetensors": content}, kind="model") as fake:
        point_at(fake.url, monkeypatch)
        if sha256 == "wrong":
            with (
                pytest.raises(UserError, match="and it should have wrong"),
                fetch_pinned(HubPin(repo, "model.safetensors", known), QUICK),
            ):
                pass
            assert len(fake.requests) == 2
        else:
            with fetch_pinned(HubPin(repo, "model.safetensors", known), QUICK) as path:
                assert path.read_bytes() == content
            assert len(fake.requests) == 3
        with (
            pytest.raises(UserError, match=r"from http://127\.0\.0\.1:\d+ does not have pytorch_model\.bin"),
            fetch_pinned(HubPin(repo, "pytorch_model.bin", None), QUICK),
        ):
            pass


# ---- Another column, and bad rows ------------------------------------------------------------------------------------


def test_another_column_is_the_text_and_the_files_stay_as_they_are(hub: FakeHub, tmp_path: Path) -> None:
    content = parquet_bytes(content=["one", None, "two"], text=[1, 2, 3])
    for name in [name for name in hub.files if name.startswith(FOLDER) and name.endswith(".parquet")]:
        hub.files[name] = content
    with pytest.raises(UserError, match=r"the column `text` holds int64, not strings, .*set download\.text_column"):
        source().write(tmp_path / "refused", tmp_path / "work")
    chosen = source(text_column="content")
    written = chosen.write(tmp_path / "raw", tmp_path / "work")
    write_manifest(tmp_path / "raw", chosen.identity(), written)
    assert (tmp_path / "raw/000_00000.parquet").read_bytes() == content
    assert [row["text"] for row in iterate_raw(tmp_path / "raw")] == ["one", None, "two"] * 3
    assert chosen.identity()["text_column"] == "content"
    assert "text_column" not in source().identity()
    short = source(text_column="content", max_tokens=2)
    assert short.write(tmp_path / "short", tmp_path / "work").counts["tokens_estimated"] == 2


def test_texts_that_are_not_utf8_are_counted_and_skipped(hub: FakeHub, tmp_path: Path) -> None:
    texts = [b"good"] * 500 + [b"\xff", b"\xfe", None] + [b"good"] * 500
    content = parquet_bytes(text=pa.array(texts, pa.binary()).view(pa.string()))
    for name in [name for name in hub.files if name.startswith(FOLDER) and name.endswith(".parquet")]:
        hub.files[name] = content
    chosen = source(bad_rows="skip")
    written = chosen.write(tmp_path / "raw", tmp_path / "work")
    assert written.counts["bad_rows"] == {"not UTF-8": 6}
    write_manifest(tmp_path / "raw", chosen.identity(), written)
    assert sum(row["text"] == "good" for row in iterate_raw(tmp_path / "raw")) == 3000
    assert chosen.identity()["bad_rows"] == "skip"
    hub.files[FILE] = parquet_bytes(text=pa.array([b"\xff"] * 100, pa.binary()).view(pa.string()))
    for stored in (tmp_path / "state").rglob("*"):
        if stored.is_file():
            stored.unlink()
    with pytest.raises(
        UserError, match=r"104 of 2,106 rows are bad, more than 1%, .*\n  - 104 not UTF-8: in 000_00000"
    ):
        source(bad_rows="skip").write(tmp_path / "again", tmp_path / "work")


def test_a_folder_of_text_files_becomes_parquet(hub: FakeHub, tmp_path: Path) -> None:
    hub.files |= {
        "text/b.jsonl.gz": gzip.compress(b'{"content": "two"}\n{"content": 5}\n'),
        "text/a.jsonl": b'{"content": "one"}\n',
        "text/README.md": b"no text",
        "text/dataset_infos.json": b"{}",
    }
    chosen = source(folder="text", text_column="content", bad_rows="skip")
    written = chosen.write(tmp_path / "raw", tmp_path / "work")
    write_manifest(tmp_path / "raw", chosen.identity(), written)
    assert [row["text"] for row in iterate_raw(tmp_path / "raw")] == ["one", "two"]
    assert written.counts["bad_rows"] == {"text is a whole number": 1}
    assert [file["path"] for file in chosen.identity()["files"]] == ["text/a.jsonl", "text/b.jsonl.gz"]
    with pytest.raises(UserError, match="there is no `text`"):
        source(folder="text").write(tmp_path / "again", tmp_path / "work")


@pytest.mark.parametrize("name", ["a.jsonl", "b.csv", "c.tsv", "d.json"])
def test_bad_rows_of_text_files_are_counted_by_reason(hub: FakeHub, tmp_path: Path, name: str) -> None:
    (tmp_path / "files").mkdir()
    good = plant(tmp_path / "files", [name], good=1600)
    hub.files[f"text/{name}"] = (tmp_path / "files" / name).read_bytes()
    chosen = source(folder="text", bad_rows="skip")
    written = chosen.write(tmp_path / "raw", tmp_path / "work")
    reasons = [reason for file, _, reason in PLANTED if file == name]
    assert written.counts["bad_rows"] == {reason: reasons.count(reason) for reason in reasons}
    write_manifest(tmp_path / "raw", chosen.identity(), written)
    assert [row["text"] for row in iterate_raw(tmp_path / "raw")] == good


def test_subfolders_count_if_the_folder_has_no_files_itself(
    hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.page = 2
    del hub.files["other/000_00000.parquet"]  # not parquet
    hub.files |= {
        "data/README.md": b"no text",
        "data/b/part.parquet": parquet_bytes(text=["b"]),
        "data/a/part.parquet": parquet_bytes(text=["a"]),
        "data/a/deep/part.parquet": parquet_bytes(text=["deep"]),
        "database/part.parquet": parquet_bytes(text=["of another folder"]),
    }
    written = source(folder="data/").write(tmp_path / "raw", tmp_path / "work")
    write_manifest(tmp_path / "raw", source(folder="data").identity(), written)
    assert [row["text"] for row in iterate_raw(tmp_path / "raw")] == ["deep", "a", "b"]
    assert "the files of its subfolders are used (data/a, data/a/deep, data/b)" in capfd.readouterr().out
    before = len(hub.requests)
    source(folder="data").identity()
    assert len(hub.requests) == before  # the list is stored
    assert (
        source(folder="").write(tmp_path / "all", tmp_path / "work").files[0].name == "data%2Fa%2Fdeep%2Fpart.parquet"
    )


@pytest.mark.parametrize(
    "path", ["data/../../out.parquet", "data//out.parquet", "data/./out.parquet", "other/out.parquet"]
)
def test_a_list_of_subfolders_cannot_name_what_lies_elsewhere(path: str) -> None:
    assert not HubFolder("data", is_deep=True).has(path)
    assert HubFolder("data", is_deep=True).has("data/a/b.parquet")
    assert not HubFolder("data").has("data/a/b.parquet")


def test_a_folder_that_has_files_does_not_need_its_subfolders(hub: FakeHub) -> None:
    hub.files[f"{FOLDER}/below/000.parquet"] = parquet_bytes(text=["below"])
    assert len(source().identity()["files"]) == 3
    assert not any("recursive" in request for request in hub.requests)


def test_small_files_in_plain_git_are_verified_by_gits_hash(hub: FakeHub, tmp_path: Path) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n'
    hub.files["text/a.jsonl"] = content
    hub.listed = Answer(json.dumps([{**entry_of("text/a.jsonl", content), "lfs": None}]).encode())
    chosen = source(folder="text")
    (file,) = chosen.identity()["files"]
    assert file == {
        "path": "text/a.jsonl", "bytes": len(content), "sha256": "",
        "git_sha1": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
    }  # fmt: skip
    write_manifest(tmp_path / "raw", chosen.identity(), chosen.write(tmp_path / "raw", tmp_path / "work"))
    assert [row["text"] for row in iterate_raw(tmp_path / "raw")] == ["one", "two"]
    hub.served["text/a.jsonl"] = content.replace(b"two", b"too")
    next((tmp_path / "state/hub").rglob("a.jsonl")).unlink()
    with pytest.raises(UserError, match="its hash differs from the hub's list"):
        chosen.write(tmp_path / "again", tmp_path / "work")


@pytest.mark.usefixtures("hub")
def test_a_file_with_a_sha256_is_identified_as_before() -> None:
    assert source().identity()["files"][0].keys() == {"path", "bytes", "sha256"}
