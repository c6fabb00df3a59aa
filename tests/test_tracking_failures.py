"""MLflow that is away, slow, broken or nonsense costs a stage a second at most, one line, and nothing of its record."""

import base64
import http.server
import json
import os
import shutil
import socket
import sqlite3
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_tracking import points, record_path, runs, start, steps

from pipelib.cli.main import main
from pipelib.stage import run_stage
from pipelib.tracking import mirror, mlflow_store
from pipelib.tracking.mirror import Mirror, is_mirroring
from pipelib.tracking.mlflow_store import LOCAL_WAIT_SECONDS, SERVER_WAIT_SECONDS, TrackingUri
from pipelib.tracking.record import read_events

pytestmark = [
    pytest.mark.usefixtures("workspace"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]

Said = pytest.CaptureFixture[str]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers; at its end nobody waits for it any more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"
    while is_mirroring():
        time.sleep(0.01)


@pytest.fixture
def said(capsys: Said) -> Said:
    """What is printed."""
    return capsys


def dead_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# ---- On a fake clock -------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes only where somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0


class Event:
    """The stage's end, `at` some time."""

    def __init__(self, clock: Clock, at: float = float("inf")) -> None:
        self.clock, self.at = clock, at

    def is_set(self) -> bool:
        return self.clock.now >= self.at

    def set(self) -> None:
        self.at = self.clock.now

    def wait(self, seconds: float) -> bool:
        self.clock.now += min(seconds, max(0.0, self.at - self.clock.now))
        return self.is_set()


@pytest.mark.parametrize("wait", ["", "0.25"])
def test_a_stage_waits_once_and_for_a_second_at_most(monkeypatch: pytest.MonkeyPatch, said: Said, wait: str) -> None:
    """The worst case: a thread that is stuck in MLflow for ever."""
    clock, waits = Clock(), []

    class StuckThread:
        def __init__(self, **options: object) -> None: ...

        def start(self) -> None: ...

        def is_alive(self) -> bool:
            return True

        def join(self, seconds: float) -> None:
            waits.append(seconds)
            clock.now += seconds

    class Threading:
        Thread = StuckThread
        Event = staticmethod(lambda: Event(clock))

    monkeypatch.setattr(mirror, "threading", Threading)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("PIPELIB_TRACKING_WAIT", wait)
    with start() as run:
        for step in range(100):
            run.log({"train/loss": 4.0}, step)
        run.log_text("a.txt", "b")
        run.log_params({"workers": 2})
        assert waits == []
    assert waits == [float(wait or SERVER_WAIT_SECONDS)]
    assert clock.now <= 1.0
    assert f"did not take all of this run within {clock.now:g} s" in said.readouterr().err
    assert len(points(record_path())) == 100


def refused(_: Clock) -> None:
    raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))


def silent(clock: Clock) -> None:
    clock.now += 5.0
    raise TimeoutError("timed out")


def broken(_: Clock) -> None:
    raise urllib.error.HTTPError("http://host", 503, "Service Unavailable", None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("server", [refused, silent, broken])
def test_a_server_that_fails_is_asked_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, said: Said, server: Callable[[Clock], None]
) -> None:
    """An hour of training; every request has a deadline, and none is made at the end."""
    with start(mlflow=False):
        pass
    clock, asked = Clock(), []

    def urlopen(address: str, timeout: float) -> None:
        assert address == "http://host"
        asked.append((clock.now, timeout))
        server(clock)

    monkeypatch.setattr(mlflow_store.urllib.request, "urlopen", urlopen)
    mirror = Mirror(record_path(), 0, TrackingUri("http://host", None))
    mirror._closing = Event(clock, at=3600.0)  # type: ignore[assignment]
    mirror._work()
    assert clock.now == 3600.0
    assert 50 <= len(asked) <= 60
    assert {timeout for _, timeout in asked} == {5.0}
    assert len(said.readouterr().err.splitlines()) == 1


@dataclass
class SlowClient:
    """MLflow's client, each call of which takes so long."""

    client: Any
    clock: Clock
    seconds: float
    calls: int = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.calls += 1
            self.clock.now += self.seconds
            return method(*arguments, **named)

        return call


def test_a_slow_server_gets_few_large_calls(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    """Two minutes of training with 3 numbers a second; a call takes 4 s."""
    with start(mlflow=False):
        pass
    clock, written = Clock(), [0]
    slow = SlowClient(client, clock, seconds=4.0)

    class Training(Event):
        """What the stage recorded since the mirror last looked is there when it looks again."""

        def is_set(self) -> bool:
            with record_path().open("a") as record:
                for step in range(written[0], int(min(clock.now, self.at))):
                    numbers = {f"m{number}": step + 0.5 for number in range(3)}
                    record.write(
                        json.dumps({"time": step, "event": "metrics", "step": step, "metrics": numbers}) + "\n"
                    )
                    written[0] = step + 1
            return super().is_set()

    monkeypatch.setattr(TrackingUri, "open", lambda tracking_uri: mlflow_store.Store(tracking_uri, slow, None))
    mirror = Mirror(record_path(), record_path().stat().st_size, TrackingUri("http://host", None))
    mirror._closing = Training(clock, at=120.0)  # type: ignore[assignment]
    mirror._work()
    (train,) = runs(client, "train")
    assert steps(client, train, "m0") == list(range(120))
    assert slow.calls < 60


# ---- Servers, for real -----------------------------------------------------------------------------------------------


def test_a_dead_server_costs_one_line(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    port = dead_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:canary-pw@127.0.0.1:{port}")
    with start() as run:  # refused at once: the wait ends with the mirror's only try
        run.log({"train/loss": 1.0}, 1)
    (line,) = said.readouterr().err.splitlines()
    assert f"MLflow at http://***@127.0.0.1:{port} failed" in line
    assert f"`pipelib track --replay {os.environ['DVC_EXP_NAME']}` sends it later" in line
    assert points(record_path()) == [("train/loss", 1)]


def test_a_server_that_never_answers_is_left_at_the_deadline(
    silent_server: str, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{silent_server}")
    monkeypatch.setenv("PIPELIB_TRACKING_WAIT", "0.01")
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
    (line,) = said.readouterr().err.splitlines()
    assert "did not take all of this run within 0.01 s" in line


def test_a_stage_ends_at_once_while_a_thread_is_stuck_in_mlflow(
    silent_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    def exit_at_once(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)

    def main() -> None:
        with start():
            pass

    monkeypatch.setattr(os, "_exit", exit_at_once)
    with pytest.raises(SystemExit, match="0"):
        run_stage("train", lambda: None)
    assert ended == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{silent_server}")
    monkeypatch.setenv("PIPELIB_TRACKING_WAIT", "0.01")
    with pytest.raises(SystemExit):
        run_stage("train", main)
    assert ended == [0]


def test_the_deadline_is_short_for_a_server_and_longer_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPELIB_TRACKING_WAIT")
    assert TrackingUri.chosen().wait_seconds == LOCAL_WAIT_SECONDS
    for uri in ("http://host", "HTTPS://host", "postgresql://host/x", "databricks"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert TrackingUri.chosen().wait_seconds == SERVER_WAIT_SECONDS < 1
    for uri in ("./mlruns", "mlruns", "/srv/a:b/mlruns", "file:///srv/mlruns", "sqlite+pysqlite:////srv/x.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert TrackingUri.chosen().wait_seconds == LOCAL_WAIT_SECONDS


def test_a_deadline_that_is_no_number_is_said_and_passed_over(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setenv("PIPELIB_TRACKING_WAIT", "soon")
    assert TrackingUri("http://host", None).wait_seconds == SERVER_WAIT_SECONDS
    assert "PIPELIB_TRACKING_WAIT=soon is not a number of seconds, so 0.8 s is used" in said.readouterr().err


def test_a_server_that_comes_back_gets_what_it_missed(monkeypatch: pytest.MonkeyPatch, client: Any, said: Said) -> None:
    tries, back = [], threading.Event()
    opened = TrackingUri.open

    def open_second_time(tracking_uri: TrackingUri) -> mlflow_store.Store:
        tries.append(tracking_uri)
        if len(tries) == 1:
            raise ConnectionError("away")
        back.set()
        return opened(tracking_uri)

    monkeypatch.setattr(mirror, "COOLDOWN_SECONDS", 0.001)
    monkeypatch.setattr(TrackingUri, "open", open_second_time)
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
        assert back.wait(60)
    (train,) = runs(client, "train")
    assert train.data.metrics == {"train/loss": 1.0}
    assert train.info.status == "FINISHED"
    assert len(said.readouterr().err.splitlines()) == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server with an error of its own."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def test_a_server_with_an_error_of_its_own_is_away(monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        with start():
            pass
        server.shutdown()
    (line,) = said.readouterr().err.splitlines()
    assert "failed (HTTPError: HTTP Error 503" in line


@pytest.fixture
def real_server(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, list[str]]]:
    """MLflow's own server, in this process, behind a door that asks who it is; its address, and who asked."""
    from mlflow.server import app as mlflow_app
    from mlflow.server import constants, handlers
    from werkzeug.serving import make_server

    database = shutil.copy(empty_database, tmp_path / "server.db")
    monkeypatch.setenv(constants.BACKEND_STORE_URI_ENV_VAR, f"sqlite:///{database}")
    monkeypatch.setenv(constants.ARTIFACT_ROOT_ENV_VAR, "mlflow-artifacts:/")
    monkeypatch.setenv(constants.SERVE_ARTIFACTS_ENV_VAR, "true")
    monkeypatch.setenv(constants.ARTIFACTS_DESTINATION_ENV_VAR, str(tmp_path / "artifacts"))
    for cached in ("_tracking_store", "_artifact_repo"):
        monkeypatch.setattr(handlers, cached, None)
    asked: list[str] = []
    expected = "Basic " + base64.b64encode(b"someone:canary-password").decode()

    def door(environ: dict[str, Any], respond: Any) -> Any:
        if environ["PATH_INFO"].startswith("/api/"):
            asked.append(environ.get("HTTP_AUTHORIZATION", ""))
            if asked[-1] != expected:
                respond("401 Unauthorized", [("Content-Type", "text/plain")])
                return [b"who are you?"]
        return mlflow_app(environ, respond)

    server = make_server("127.0.0.1", 0, door, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.mark.filterwarnings("ignore")  # what the server itself warns of
@pytest.mark.parametrize("where", ["environment", "address"])
def test_a_remote_server_that_asks_who_it_is(
    real_server: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, said: Said, where: str
) -> None:
    address, asked = real_server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
    with start() as run:
        run.log({"train/loss": 2.0}, 1)
    line = said.readouterr().err
    assert "401" in line
    assert "the server wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in line
    if where == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "someone")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-password")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:canary-password@{address}")
    asked.clear()
    with start() as run:
        run.log({"train/loss": 1.0}, 2)
        run.log_text("a.txt", "canary-password")
    assert said.readouterr().err == ""
    assert set(asked) == {"Basic " + base64.b64encode(b"someone:canary-password").decode()}
    from mlflow import MlflowClient

    served = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (train,) = runs(served, "train")
    assert steps(served, train, "train/loss") == [1, 2]
    (file,) = Path("artifacts").rglob("a.txt")
    assert file.read_text() == "***"
    assert "canary" not in record_path().read_text()


# ---- Nonsense --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "nonsense://host", "http://", "http://[half", "http://user:canary/pw@127.0.0.1:1", "not a uri",
        "postgresql://user:canary-pw@127.0.0.1:1/x", "file:///proc/nowhere", "http://127.0.0.1:port", "sqlite:///no-database",
    ],
    ids=[*"abcdefghi"],
)  # fmt: skip
def test_nonsense_as_an_address(monkeypatch: pytest.MonkeyPatch, said: Said, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    Path("no-database").write_text("text" * 100)
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
    (line,) = said.readouterr().err.splitlines()
    assert " failed (" in line
    assert "canary" not in line
    assert points(record_path()) == [("train/loss", 1)]
    assert read_events(record_path())[0][-1]["status"] == "finished"
    assert {path.name for path in Path().iterdir()} == {"state", "no-database"}


@pytest.fixture
def database(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database of this test's own, which is the repository's."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


def client_of(database: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{database}")


@pytest.mark.parametrize("scheme", ["", "sqlite+pysqlite"])
def test_a_locked_database_and_the_end_of_the_lock(
    database: Path, monkeypatch: pytest.MonkeyPatch, said: Said, scheme: str
) -> None:
    if scheme:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}:///{database}")
    monkeypatch.setattr(mlflow_store, "LOCK_SECONDS", 0.05)
    holder = sqlite3.connect(database)
    holder.execute("BEGIN EXCLUSIVE")
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
    (line,) = said.readouterr().err.splitlines()
    assert "database is locked; another program holds its lock: end that program, or wait" in line
    holder.rollback()
    holder.close()
    with start() as run:
        run.log({"train/loss": 0.5}, 2)
    assert said.readouterr().err == ""
    assert steps(client_of(database), runs(client_of(database), "train")[0], "train/loss") == [1, 2]


def test_a_read_only_database(database: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{database}?mode=ro&uri=true")
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
    (line,) = said.readouterr().err.splitlines()
    assert "readonly database; it is read-only: give write permission" in line
    assert points(record_path()) == [("train/loss", 1)]


def test_a_database_of_a_newer_mlflow(database: Path, said: Said) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    with start() as run:
        run.log({"train/loss": 1.0}, 1)
    (line,) = said.readouterr().err.splitlines()
    assert "another version of MLflow made it" in line
    assert points(record_path()) == [("train/loss", 1)]


def test_an_experiment_that_was_deleted(database: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    with start():
        pass
    client = client_of(database)
    first = client.get_experiment_by_name("pipelib").experiment_id
    client.delete_experiment(first)
    for name in ("second", "third"):
        monkeypatch.setenv("DVC_EXP_NAME", name)
        with start():
            pass
    (line,) = said.readouterr().err.splitlines()
    assert "the experiment pipelib was deleted in MLflow, so runs go to pipelib-2" in line
    second = client.get_experiment_by_name("pipelib-2").experiment_id
    assert len(client.search_runs([second])) == 4
    client.restore_experiment(first)
    monkeypatch.setenv("DVC_EXP_NAME", "fourth")
    with start():
        pass
    assert main(["track", "--replay", "second"]) == 0
    assert len(client.search_runs([first])) == 4
    assert len(client.search_runs([second])) == 4


def test_a_run_that_goes_on_after_it_was_deleted(client: Any, said: Said) -> None:
    with start() as run:
        run.log({"train/loss": 4.0}, 1)
        run.log_text("a.txt", "one")
    (first,), (parent,) = runs(client, "train"), runs(client, "pipeline")
    client.delete_run(first.info.run_id)
    with start() as run:
        run.log({"train/loss": 3.0}, 2)
    (second,) = runs(client, "train")
    assert second.info.run_id != first.info.run_id
    assert steps(client, second, "train/loss") == [1, 2]
    assert [file.path for file in client.list_artifacts(second.info.run_id)] == ["a.txt"]
    assert second.data.tags["mlflow.parentRunId"] == parent.info.run_id
    (line,) = said.readouterr().err.splitlines()
    assert "was deleted in MLflow, so a new one is created there" in line


def test_a_run_whose_parent_was_deleted_gets_a_new_one(client: Any) -> None:
    with start() as run:
        run.log({"train/loss": 4.0}, 1)
    (train,), (parent,) = runs(client, "train"), runs(client, "pipeline")
    client.delete_run(parent.info.run_id)
    with start() as run:
        run.log({"train/loss": 3.0}, 2)
    (same,), (other,) = runs(client, "train"), runs(client, "pipeline")
    assert same.info.run_id == train.info.run_id
    assert other.info.run_id != parent.info.run_id
    assert other.data.params["train.max_lr"] == "0.0018"


def test_a_run_that_is_deleted_while_it_goes_on_is_left_alone(
    client: Any, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.001)
    with start() as run:
        run.log({"train/loss": 4.0}, 1)
        while not (found := client.search_runs(["1"], f"tags.`pipelib.key` = '{os.environ['DVC_EXP_NAME']}'")):
            threading.Event().wait(0.01)
        (parent,) = found
        while not (train := client.search_runs(["1"], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")):
            threading.Event().wait(0.01)
        client.delete_run(train[0].info.run_id)
        for step in range(2, 5):
            run.log({"train/loss": 3.0}, step)
    assert runs(client, "train") == []
    (line,) = said.readouterr().err.splitlines()
    assert "shows this run as deleted by you" in line


def test_a_run_that_is_deleted_before_it_is_shown_as_running_is_left_alone(
    client: Any, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    update_run = MlflowClient.update_run

    def too_late(self: Any, run_id: str, **change: Any) -> None:
        if self.get_run(run_id).data.tags["pipelib.stage"] == "train":
            self.delete_run(run_id)
        update_run(self, run_id, **change)

    monkeypatch.setattr(MlflowClient, "update_run", too_late)
    with start() as run:
        run.log({"train/loss": 4.0}, 1)
    assert runs(client, "train") == []
    (line,) = said.readouterr().err.splitlines()
    assert "shows this run as deleted by you" in line


def test_two_pipelines_at_once_on_one_database(client: Any, monkeypatch: pytest.MonkeyPatch, said: Said) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.001)
    names = ("one_of_two", "two_of_two")
    monkeypatch.setenv("DVC_EXP_NAME", names[0])
    with start() as one:
        monkeypatch.setenv("DVC_EXP_NAME", names[1])
        with start() as two:
            for step in range(200):
                one.log({"train/loss": 1.0 * step}, step)
                two.log({"train/loss": 2.0 * step}, step)
    assert said.readouterr().err == ""
    for name in names:
        monkeypatch.setenv("DVC_EXP_NAME", name)
        (train,) = runs(client, "train")
        assert steps(client, train, "train/loss") == list(range(200))
        assert runs(client, "pipeline")[0].info.status == "FINISHED"
