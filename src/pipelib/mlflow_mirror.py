"""MLflow's view of a record, kept by a thread that nothing waits for.

The thread reads the record as it grows and repeats it to MLflow, so the file is the queue: nothing is dropped, and what a
kill or a dead server left unsent is read again at the next open. In MLflow a KEY is a parent run and each record of it a
child.
"""

import fcntl
import json
import os
import posixpath
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelib.record import brief, read_events, redact, say
from pipelib.state import state_root

EXPERIMENT = "pipelib"
SECTIONS = {
    "download": ("download",),
    "tokenize": ("tokenize",),
    "train": ("model", "train"),
    "evaluate": ("evaluate",),
}
"""The stages in their order, and the sections of params.yaml that decide what each makes."""
LAST = "evaluate"
"""The stage whose success completes the parent run."""
POLL_SECONDS = 1.0
"""Between two looks at the record; points of one second travel in one call."""
COOLDOWN_SECONDS = 60.0
"""The mirror leaves a server alone for so long after it failed."""
LOCAL_WAIT_SECONDS, REMOTE_WAIT_SECONDS = 30.0, 1.0
"""The longest that the end of a stage waits for a database on this machine, or for a server."""

Event = Mapping[str, Any]
Point = tuple[str, int, int, float]
"""MLflow's key, step, time in milliseconds, value."""


class MlflowRun:
    """A record's child run in MLflow, and its parent; both found by their tags, or made."""

    def __init__(self, client: Any, opened: Event, artifacts: str | None) -> None:
        """Args:
        client: an `MlflowClient`.
        opened: the record's last `open` event.
        artifacts: where a new experiment keeps its files; None leaves it to the server.
        """
        self.client, self.opened, self.stage = client, opened, str(opened["stage"])
        experiment = client.get_experiment_by_name(EXPERIMENT)
        self.experiment: str = (
            experiment.experiment_id
            if experiment
            else client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        )
        key, fingerprint = opened["key"], opened["fingerprint"]
        parent = {"pipelib.key": key, "pipelib.inputs": opened["inputs"], "pipelib.stage": "pipeline"}
        self.parent = self._find(parent) or self._create(parent, key)
        family = {"mlflow.parentRunId": self.parent, "pipelib.stage": self.stage}
        child = {**family, "pipelib.fingerprint": fingerprint, "pipelib.record": opened["record"]}
        found = self._find(child)
        self.child = found or self._create(child, self.stage)
        self._had: set[tuple[str, int, int]] = set()
        self._files: set[str] | None = None if found else set()
        for name in client.get_run(self.child).data.metrics if found else ():
            self._had |= {(name, point.step, point.timestamp) for point in client.get_metric_history(self.child, name)}

    def send(self, events: Sequence[Event], replay: bool) -> None:
        """Repeat events of the record to MLflow.

        Args:
            replay: they are from before the record was opened this time; MLflow may have them already.
        """
        points = [
            (_name(key), event["step"] or 0, round(event["time"] * 1000), float(value))
            for event in events
            if event["event"] == "metrics"
            for key, value in event["metrics"].items()
        ]
        self._log(self.child, points=[point for point in points if point[:3] not in self._had])
        for event in events:
            match event:
                case {"event": "text" | "file", "name": name}:
                    if not (replay and name in self._files_had()):
                        self._send_file(event)
                case {"event": "params", "params": params}:
                    self._log(self.child, params=params)
                case {"event": "tags", "tags": tags}:
                    self._log(self.child, tags=tags)
                    self._log(self.parent, tags=tags)
                case {"event": "input", "name": name, "digest": digest}:
                    self._send_input(name, digest)
                case {"event": "open"} if not replay:
                    self._begin()
                case {"event": "summary"} if not replay:
                    self._summarize(event)
                case {"event": "end", "status": status, "time": at} if not replay:
                    self._end(status.upper(), round(at * 1000))

    def _find(self, tags: Mapping[str, str]) -> str | None:
        where = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        found = self.client.search_runs(
            [self.experiment], where, max_results=1, order_by=["attributes.start_time DESC"]
        )
        return found[0].info.run_id if found else None

    def _create(self, tags: Mapping[str, str], name: str) -> str:
        return str(self.client.create_run(self.experiment, tags=dict(tags), run_name=name).info.run_id)

    def _begin(self) -> None:
        tags, params = dict(self.opened["tags"]), self.opened["params"]
        for run, own in ((self.parent, params), (self.child, _own(params, self.stage))):
            self._log(run, params=own, tags=tags)
            self.client.update_run(run, status="RUNNING")

    def _end(self, status: str, at: int) -> None:
        """End the child; the parent ends with the last stage, or with the first that does not finish."""
        self.client.set_terminated(self.child, status, end_time=at)
        if status != "FINISHED" or self.stage == LAST:
            self.client.set_terminated(self.parent, status, end_time=at)

    def _summarize(self, event: Event) -> None:
        """Complete the parent: a child for every stage that DVC skipped, all final metrics, the model's digest."""
        for stage, metrics in event["metrics"].items():
            self._log_finals(self.parent, metrics)
            family = {"mlflow.parentRunId": self.parent, "pipelib.stage": stage}
            child = self._find(family)
            if child is None or self.client.get_run(child).data.tags.get("dvc.cached"):
                child = child or self._create({**family, "dvc.cached": "true"}, stage)
                self._log(child, params=_own(self.opened["params"], stage))
                self._log_finals(child, metrics)
                self.client.set_terminated(child)
            if stage == "train":
                self._log(child, tags=event["model"])
        self._log(self.parent, tags=event["model"])

    def _log_finals(self, run: str, metrics: Mapping[str, float]) -> None:
        had, now = self.client.get_run(run).data.metrics, round(time.time() * 1000)
        self._log(
            run, points=[(_name(k), 0, now, float(v)) for k, v in metrics.items() if had.get(_name(k)) != float(v)]
        )

    def _log(
        self, run: str, points: list[Point] | None = None, params: Event | None = None, tags: Event | None = None
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(name, value, at, step) for name, step, at, value in points or ()]
        texts = [Param(_name(name), _text(value)) for name, value in (params or {}).items()]
        marks = [RunTag(_name(name), _text(value)) for name, value in (tags or {}).items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limits: 1000 points, 100 parameters, 100 tags a call
            self._accepted(self.client.log_batch, run, metrics=metrics[start : start + 1000])
        for start in range(0, max(len(texts), len(marks)), 100):
            part = slice(start, start + 100)
            self._accepted(self.client.log_batch, run, params=texts[part], tags=marks[part])

    def _files_had(self) -> set[str]:
        if self._files is None:
            waiting: list[str | None] = [None]
            self._files = set()
            while waiting:
                for entry in self.client.list_artifacts(self.child, waiting.pop()):
                    (waiting.append if entry.is_dir else self._files.add)(entry.path)
        return self._files

    def _send_file(self, event: Event) -> None:
        name, path, text = event["name"], event.get("path"), event.get("text")
        if path is not None and Path(path).is_file():
            try:
                text = redact(Path(path).read_text(encoding="utf-8"))
            except UnicodeDecodeError:  # a picture
                self._accepted(self.client.log_artifact, self.child, path, posixpath.dirname(name) or None)
        if text is not None:
            self._accepted(self.client.log_text, self.child, text, name)

    def _send_input(self, name: str, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"path": name, "sha256": digest})
        dataset = Dataset(name, digest[:36], "local", source)  # MLflow's digests end at 36 characters
        tags = [InputTag("mlflow.data.context", "training" if self.stage == "train" else "evaluation")]
        self._accepted(self.client.log_inputs, self.child, [DatasetInput(dataset, tags)])

    def _accepted(self, call: Callable[..., object], *arguments: object, **named: object) -> None:
        """Call, and pass over what MLflow refuses as invalid: sent again, it would be refused again."""
        try:
            call(*arguments, **named)
        except Exception as error:
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            say(f"MLflow refuses a part of this run ({brief(error)}), so that is only in the record; the rest goes on.")


def _name(key: str) -> str:
    """A name that MLflow allows: `acc,none` becomes `acc_none`."""
    return re.sub(r"[^\w/.\- :]", "_", key)[:250]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _own(params: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name.split(".")[0] in SECTIONS[stage]}


class Mirror:
    """Keeps MLflow equal to a record, from a daemon thread.

    A server that fails is left alone for a minute, then read again from the start: what it has and the record's rest
    tell what to send. MLflow takes a second or two to import; that happens in the thread, beside the work.
    """

    def __init__(self, record: Path, start: int, database: Path, wait: float | None = None) -> None:
        """Args:
        record: the file to follow.
        start: its size in bytes before it was opened this time; `close` lets everything before and after be sent.
        database: the SQLite file to use unless MLFLOW_TRACKING_URI is set.
        wait: seconds that `close` may take; by default PIPELIB_TRACKING_WAIT, else 30 here and 1 for a server.
        """
        _prepare_mlflow()
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"
        self._record, self._start, self._database = record, start, database
        self._local = urlsplit(self.uri).scheme in ("", "file", "sqlite")
        self._lock = state_root().absolute() / "mlflow.lock"
        chosen = os.environ.get("PIPELIB_TRACKING_WAIT")
        default = float(chosen) if chosen else LOCAL_WAIT_SECONDS if self._local else REMOTE_WAIT_SECONDS
        self._wait = default if wait is None else wait
        self._closing, self._answered, self._imported = threading.Event(), threading.Event(), threading.Event()
        self._said = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until everything is sent, but no longer than allowed; say so if something is left."""
        self._closing.set()
        if self._answered.is_set() and not self._local:
            self._imported.wait(10)  # the server lives: a stage shorter than MLflow's import is no reason to lose it
        self._thread.join(self._wait)
        if self._thread.is_alive():
            self._complain(f"did not take all of this run within {self._wait:g} s of its end")
        self._said = True

    def _work(self) -> None:
        while True:
            try:
                self._follow()
                return
            except Exception as error:
                self._complain(f"failed ({brief(error)})")
            if self._closing.wait(COOLDOWN_SECONDS):
                return

    def _follow(self) -> None:
        view = self._connect()
        events, offset = read_events(self._record, 0, self._start)
        view.send(events, replay=True)
        while True:
            closing = self._closing.is_set()  # asked first: what was written before close is seen below
            events, offset = read_events(self._record, offset)
            view.send(events, replay=False)
            if closing:
                return
            self._closing.wait(POLL_SECONDS)

    def _connect(self) -> MlflowRun:
        _require_answer(self.uri)
        self._answered.set()
        try:
            from mlflow import MlflowClient
        finally:
            self._imported.set()
        opened = [event for event in read_events(self._record)[0] if event["event"] == "open"][-1]
        # Several processes that open a new database at once break each other; two stages must share one parent.
        with _locked(self._lock):
            if os.environ.get("MLFLOW_TRACKING_URI"):
                return MlflowRun(MlflowClient(self.uri), opened, None)
            if not self._database.exists():
                _make_whole(self._database, lambda fresh: MlflowClient(f"sqlite:///{fresh}"))
            return MlflowRun(MlflowClient(self.uri), opened, str(self._database.with_name("mlartifacts")))

    def _complain(self, what: str) -> None:
        """Say once what MLflow did and how to send the rest; the first failure explains the later ones."""
        if not self._said:
            self._said = True
            stage = self._record.name.split("-")[0]
            say(
                f"MLflow at {self.uri} {what}, so the rest is only in {self._record}. While the stage runs it is tried "
                f"again every minute; later `PIPELIB_TRACKING_WAIT=60 dvc repro -fs {stage}` sends it (work that is "
                "finished is not done again)."
            )


def _require_answer(uri: str) -> None:
    """OSError unless an HTTP server gives any answer; nothing for other stores. Costs no import of MLflow."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    try:
        address = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
        urllib.request.urlopen(address, timeout=float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])).close()
    except urllib.error.HTTPError as error:  # an answer, whatever it thinks of us
        error.close()
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # which certificates to trust is MLflow's own business
            raise


def _make_whole(database: Path, make: Callable[[Path], object]) -> None:
    """Make a database under another name first: killed between two tables, MLflow would refuse it for ever."""
    fresh = database.with_name(f".{database.name}.tmp")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    make(fresh)
    fresh.replace(database)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _prepare_mlflow() -> None:
    """Settings that MLflow reads when imported; the user's own win. Unset, one call to a dead server takes minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the credentials in the URI
