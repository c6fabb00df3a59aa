"""The run's own record, a file of JSON lines, and its view in MLflow.

The record is the truth. The mirror is a thread that reads the record as it grows and repeats it to MLflow, so the file
is its queue: nothing waits for a server, nothing is dropped, and what a kill or a dead server left unsent is read again
at the next open. All text passes `redact` before it is written, and MLflow gets only what was written.

    STATE/records/KEY/STAGE-FINGERPRINT.jsonl    one object per line: {"time", "event", ...}, time in seconds since 1970

KEY stands for one pass through the pipeline: DVC's experiment name, else the hash of all parameters and code. In MLflow
a KEY is a parent run and each record a child of it.
"""

import fcntl
import json
import math
import os
import posixpath
import re
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from pipelib.config import flatten, read_yaml
from pipelib.files import files_under, read_json, sha256_file, sha256_json, write_text
from pipelib.provenance import code_hashes, git_state
from pipelib.state import state_root

if TYPE_CHECKING:
    from pipelib.params import Params

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
ARTIFACT_BYTES = 5_000_000
"""Larger files are not copied to MLflow."""
POLL_SECONDS = 1.0
"""Between two looks at the record; points of one second travel in one call."""
COOLDOWN_SECONDS = 60.0
"""The mirror leaves a server alone for so long after it failed."""
LOCAL_WAIT_SECONDS, REMOTE_WAIT_SECONDS = 30.0, 1.0
"""The longest that the end of a stage waits for a database on this machine, or for a server."""

Event = Mapping[str, Any]
Point = tuple[str, int, int, float]
"""MLflow's key, step, time in milliseconds, value."""


# ---- What leaves this module -----------------------------------------------------------------------------------------

_SECRET_NAMES = re.compile(r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
_SECRET_SHAPES = (
    (re.compile(r"(?<=://)[^/\s]*@"), "***@"),  # user:password@ of a URL, up to the last @ before a slash
    (re.compile(r"([?&][^=&\s]*(?:token|secret|password|signature|key)[^=&\s]*=)[^&\s\"']+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-)\w{16,}"), "***"),
)


def redact(text: str) -> str:
    """`text` without secrets: values of environment variables named like one, credentials in URLs, known tokens."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
    password = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).password or ""
    for secret in sorted(secrets | {password, unquote(password)}, key=len, reverse=True):
        if len(secret) >= 6:  # "true" or "1" under such a name is no secret, and is part of many words
            text = text.replace(secret, "***")
    for shape, replacement in _SECRET_SHAPES:
        text = shape.sub(replacement, text)
    return text


def _redacted(value: object) -> object:
    """A JSON value with every text in it redacted; the numbers JSON has no word for become text."""
    if isinstance(value, Mapping):
        return {redact(str(key)): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))


def _say(text: str) -> None:
    print(f"tracking: {redact(text)}", file=sys.stderr, flush=True)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Tracking never stops a stage: an error in the block becomes one line that names what is missing for it."""
    try:
        yield
    except Exception as error:
        _say(f"{_brief(error)}, so {what} not recorded; the stage goes on, its outs are complete without it.")


# ---- The record ------------------------------------------------------------------------------------------------------


class Record:
    """One run's own record: whole lines, appended, never rewritten; several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        """Open a record, or make one; OSError where the file cannot be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # torn by a kill; the next line stays whole
            os.write(self._descriptor, b"\n")
        self._torn = False
        self.id = uuid.uuid4().hex
        self._points: dict[tuple[str, int | None], float] = {}
        for event in read_events(path)[0]:
            self.id = event.get("record", self.id)
            if event["event"] == "metrics":
                self._points |= {(name, event["step"]): float(value) for name, value in event["metrics"].items()}

    def append(self, event: str, **values: object) -> None:
        """Write one event; the system has it when this returns."""
        line = json.dumps(_redacted({"time": time.time(), "event": event, **values}), ensure_ascii=False)
        data = b"\n" * self._torn + line.encode("utf-8", "replace") + b"\n"  # a line cut short stays alone
        self._torn = True
        self._torn = os.write(self._descriptor, data) < len(data)

    def append_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Write those numbers that are new: no (key, step) twice, and without a step only what changed."""
        known = self._points
        new = {
            name: float(value)
            for name, value in metrics.items()
            if (name, step) not in known or (step is None and known[name, step] != float(value))
        }
        if new:
            self.append("metrics", step=step, metrics=new)
            known |= {(name, step): value for name, value in new.items()}

    def close(self) -> None:
        os.close(self._descriptor)


def read_events(path: Path, start: int = 0, end: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The events in the whole lines from byte `start` to byte `end`, and where the next one begins.

    A line torn by a kill is no event: it is passed over once a line follows it.
    """
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(-1 if end is None else end - start)
    events = []
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events, start + data.rfind(b"\n") + 1


def _settle_record(path: Path, code: str) -> None:
    """Make the record fit the state: go on with it, begin again, or go on from what another KEY recorded.

    The state of a stage is found by its fingerprint alone, so a killed `dvc exp run` goes on under a new experiment's
    name; its record then begins with the points so far. State that starts again must not meet the old points.
    """
    wish = os.environ.get("PIPELIB_RESUME", "")

    def goes_on(record: Path) -> bool:
        opened = [event for event in read_events(record)[0] if event["event"] == "open"]
        return wish == "continue" or (wish != "fresh" and bool(opened) and opened[-1]["code"] == code)

    if path.exists():
        if not goes_on(path):
            path.rename(path.with_name(f"{path.stem}.until-{time.time_ns()}.jsonl"))
        return
    others = sorted(path.parent.parent.glob(f"*/{path.name}"), key=lambda other: other.stat().st_mtime)
    for other in filter(goes_on, reversed(others)):
        kept = [e for e in read_events(other)[0] if e["event"] == "text" or e.get("step") is not None]
        write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
        return


# ---- MLflow ----------------------------------------------------------------------------------------------------------


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
            _say(
                f"MLflow refuses a part of this run ({_brief(error)}), so that is only in the record; the rest goes on."
            )


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
                self._complain(f"failed ({_brief(error)})")
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
            _say(
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


# ---- The run ---------------------------------------------------------------------------------------------------------


class Run:
    """The record of one stage's run; leaving the `with` block records how it ended."""

    def __init__(self, stage: str, record: Record, mirror: Mirror | None, main: bool) -> None:
        """Args:
        main: this handle decides when the run has ended; others only add to it.
        """
        self.stage, self._record, self._mirror, self._main = stage, record, mirror, main

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            killed = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "finished" if error is None else "killed" if killed else "failed"
            if status == "finished" and self.stage == LAST:
                with _harmless("the parent run's summary is"):
                    md5 = _out_md5s(["train"]).get("models")
                    model = {"dvc.md5.models": md5} if md5 else {}
                    self._record.append("summary", metrics={stage: _finals(stage) for stage in SECTIONS}, model=model)
            with _harmless("the end of this run is"):
                self._record.append("end", status=status)
        if self._mirror:
            self._mirror.close()
        self._record.close()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or final ones without it; a step that a key has already is left as it is."""
        with _harmless(f"{', '.join(metrics)} at step {step} are"):
            self._record.append_metrics(metrics, step)

    def log_text(self, name: str, text: str) -> None:
        """Record a small text under a file's name, such as `samples/step-000100.txt`."""
        with _harmless(f"{name} is"):
            self._record.append("text", name=name, text=text)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record what was decided while running; MLflow keeps the first value of each."""
        with _harmless(f"{', '.join(params)} are"):
            self._record.append("params", params=params)

    def log_outs(self, final: Path) -> None:
        """Record finished outs: numbers in metrics/, small files in curves/ and reports/, of all others the digest.

        Args:
            final: a folder that mirrors the workspace.
        """
        with _harmless(f"the outs in {final} are"):
            meta = final.with_name("meta.json")
            hashes: Mapping[str, str] = read_json(meta).get("final", {}) if meta.exists() else {}
            outs: dict[str, dict[str, str]] = {}
            for path in files_under(final):
                name = path.relative_to(final)
                sha256 = hashes.get(name.as_posix()) or sha256_file(path)
                if name.parts[0] == "metrics":
                    self._record.append_metrics(_numbers(path, ".".join(name.with_suffix("").parts[1:])), None)
                elif name.parts[0] in ("curves", "reports"):
                    if path.stat().st_size <= ARTIFACT_BYTES:
                        self._record.append("file", name=name.as_posix(), path=str(path.absolute()), sha256=sha256)
                else:
                    out = "/".join(name.parts[:2]) if name.parts[0] == "data" else name.parts[0]
                    outs.setdefault(out, {})[name.as_posix()] = sha256
            tags = {}
            for out, files in outs.items():
                size = sum((final / name).stat().st_size for name in files)
                tags[f"out.{out}"] = f"sha256:{sha256_json(files)}, {len(files)} files, {size} bytes"
            fingerprint = outs.get("data/tokens", {}).get("data/tokens/manifest.json")
            tags |= {"data.fingerprint": fingerprint} if fingerprint else {}
            if tags:
                self._record.append("tags", tags=tags)


class NullRun(Run):
    """A run that records nothing: for ranks other than the first."""

    def __init__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    def log_text(self, name: str, text: str) -> None: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_outs(self, final: Path) -> None: ...


def open_run(stage: str, params: "Params", fingerprint: str, code: Mapping[str, str], catch_up: bool = True) -> Run:
    """The record of a stage's run, begun or gone on with, mirrored to MLflow where `logging.mlflow` says so.

    Args:
        fingerprint: of the stage's inputs.
        code: SHA-256 of the files that make the result, by path.
        catch_up: false for a second handle on a run that another process holds open: it adds to the record and leaves
            mirroring, old points included, and the end to the first.

    Returns:
        A `NullRun`, after one line to standard error, where no record can be written.
    """
    with _harmless("this run is"):
        flat = dict(flatten(params))
        decisive = {name: value for name, value in flat.items() if not name.startswith("logging.")}
        sources = {name: Path("stages") / f"{name}.py" for name in SECTIONS}
        hashes = {name: code_hashes(source, Path.cwd()) for name, source in sources.items() if source.exists()}
        inputs = sha256_json({"params": decisive, "code": hashes})
        key = re.sub(r"[^\w.-]", "_", os.environ.get("DVC_EXP_NAME") or inputs[:16])
        path = state_root().absolute() / "records" / key / f"{stage}-{fingerprint[:16]}.jsonl"
        if not catch_up:
            return Run(stage, Record(path), None, main=False)
        digest = sha256_json(dict(code))
        _settle_record(path, digest)
        record, start = Record(path), path.stat().st_size
        tags = _lineage(stage) | {name: value for name, value in flat.items() if name.startswith("logging.")}
        record.append(
            "open", record=record.id, key=key, inputs=inputs, stage=stage, fingerprint=fingerprint, code=digest,
            params=decisive, tags=tags,
        )  # fmt: skip
        if "data.fingerprint" in tags:
            record.append("input", name="data/tokens", digest=tags["data.fingerprint"])
        mirror = None
        if params.logging.mlflow:
            _prepare_mlflow()
            mirror = Mirror(path, start, Path(os.environ.get("DVC_ROOT", ".")).absolute() / "mlflow.db")
        return Run(stage, record, mirror, main=True)
    return NullRun()


def _prepare_mlflow() -> None:
    """Settings that MLflow reads when imported; the user's own win. Unset, one call to a dead server takes minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the credentials in the URI


def _lineage(stage: str) -> dict[str, Any]:
    """Tags that say where a run comes from: git, DVC's experiment, the digests of what the stages before it made."""
    git, before = git_state(Path.cwd()), [*SECTIONS][: [*SECTIONS].index(stage)]
    name, baseline = os.environ.get("DVC_EXP_NAME", ""), os.environ.get("DVC_EXP_BASELINE_REV", "")
    manifest = Path("data/tokens/manifest.json")
    has_tokens = "tokenize" in before and manifest.exists()
    commands = [f"git checkout {baseline or git['commit']}", f"dvc exp apply {name}" if name else "", "dvc repro"]
    note = "Reproduce with\n\n" + "".join(f"    {command}\n" for command in commands if command)
    if git["dirty"] == "true" and not name:
        note += "\nThe working tree had changes that are in no commit."
    tags = {
        "git.commit": git["commit"], "git.dirty": git["dirty"], "mlflow.source.git.commit": git["commit"],
        "dvc.exp_name": name, "dvc.exp_baseline_rev": baseline, "mlflow.note.content": note,
        "data.fingerprint": sha256_file(manifest) if has_tokens else "",
        **{f"dvc.md5.{path}": md5 for path, md5 in _out_md5s(before).items()},
    }  # fmt: skip
    return {tag: value for tag, value in tags.items() if value}


def _out_md5s(stages: Iterable[str]) -> dict[str, str]:
    """DVC's md5 of the outs of stages that have ended, by path; a running stage's entry is absent or stale."""
    lock = Path("dvc.lock")
    entries = read_yaml(lock).get("stages", {}) if lock.exists() else {}
    outs = [out for stage in stages for out in entries.get(stage, {}).get("outs", ())]
    return {str(out["path"]): str(out["md5"]) for out in outs if "md5" in out}


def _numbers(path: Path, prefix: str) -> dict[str, float]:
    """The numbers in a JSON file, by their dotted paths."""
    values = flatten(read_json(path), prefix)
    return {
        name: float(value) for name, value in values if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _finals(stage: str) -> dict[str, float]:
    """The final metrics of a stage as they lie in the workspace, whether it ran now or DVC found it cached."""
    files = {stage: Path("metrics") / f"{stage}.json", f"speed.{stage}": Path("metrics/speed") / f"{stage}.json"}
    return {
        name: value for prefix, path in files.items() if path.exists() for name, value in _numbers(path, prefix).items()
    }
