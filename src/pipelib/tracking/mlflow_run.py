"""What a record is in MLflow: a child run under the parent run of its KEY; sent event by event, or completed later."""

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelib.tracking.mlflow_store import Store
from pipelib.tracking.record import brief, redact, say
from pipelib.workspace.stages import STAGES

SENT = "pipelib.sent"
"""The tag of a child that says how many bytes of its record MLflow has; set when the stage ends."""

Event = Mapping[str, Any]
Point = tuple[str, int, int, float]
"""MLflow's key, step, time in milliseconds, value."""


class DeletedRun(Exception):  # noqa: N818 (not an error: the user's choice)
    """The user deleted this run in MLflow while it was being sent."""


class MlflowRun:
    """A record's child run in MLflow, and its parent; both found by their tags, or made."""

    def __init__(self, store: Store, opened: Event) -> None:
        """Args:
        opened: the record's last `open` event, with the time it `began`.
        """
        self.client, self.store = store.client, store
        self.opened, self.stage = opened, str(opened["stage"])
        self.points_sent = self.files_sent = 0
        self.files_gone: list[str] = []
        """Files that should have been sent and are no longer there."""
        self.takes_files = True
        """Whether the store of files refused none; once it has, it is asked for no more."""
        self._refused = False
        with store.place.turn():
            self.parent = self._find_parent()
            self.child, self._is_new, shown = self._find_child()
        self._had: set[tuple[str, int, int]] = set()
        self._shown: dict[str, float] = shown  # numbers that the stage's place-holder had
        self._files: dict[str, dict[str, int | None]] = {}
        data = self.client.get_run(self.child).data
        self._child_params, self._child_tags = dict(data.params), dict(data.tags)
        for name in () if self._is_new else data.metrics:
            self._had |= {
                (name, point.step, point.timestamp) for point in self.client.get_metric_history(self.child, name)
            }

    def send(self, events: Sequence[Event], replay: bool) -> None:
        """Repeat events of the record to MLflow.

        Args:
            replay: they are from before the record was opened this time: MLflow may have them, and what it shows of later
                ones stays.
        """
        points = [
            (_name(key), event["step"] or 0, round(event["time"] * 1000), float(value))
            for event in events
            if event["event"] == "metrics"
            for key, value in event["metrics"].items()
            if event["step"] is not None or self._shown.get(_name(key)) != float(value)
        ]
        self._log(self.child, points=[point for point in points if point[:3] not in self._had])
        for event in events:
            match event:
                case {"event": "text" | "file", "name": name}:
                    self._send_file(self.child, event, replay)
                    if str(name).startswith("reports/"):
                        self._send_file(self.parent, event, replay)
                case {"event": "params", "params": params}:
                    known = self._child_params if replay else {}
                    self._log(self.child, params={k: v for k, v in params.items() if _name(k) not in known})
                case {"event": "tags", "tags": tags}:
                    self._tag(tags, replay)
                case {"event": "input", "name": name, "digest": digest}:
                    self._send_input(name, digest)
                case {"event": "open"} if not replay:
                    self._begin()
                case {"event": "summary"} if not replay:
                    self._summarize(event)
                case {"event": "end", "status": status, "time": at} if not replay:
                    for run in (self.child, self.parent):
                        self._accepted(run, self.client.set_terminated, run, status.upper(), round(at * 1000))

    def complete(self, events: Sequence[Event]) -> None:
        """Have MLflow show what a whole record says: what `send` left to the live run, and how the child ended."""
        self._fill(self.parent, self.opened["params"], self.opened["tags"])
        self._fill(self.child, _own(self.opened["params"], self.stage), self.opened["tags"])
        self.send(events, replay=True)
        for summary in [event for event in events if event["event"] == "summary"][-1:]:
            self._summarize(summary)
        ends = [event for event in events if event["event"] == "end"]
        if ends:
            set_status(self.client, self.child, ends[-1])

    def mark_sent(self, size: int) -> None:
        """Note in MLflow that it has the record's first `size` bytes; not where files are missing."""
        if self.takes_files:
            self._log(self.child, tags={SENT: str(size)})

    def _find_parent(self) -> str:
        key, inputs = str(self.opened["key"]), str(self.opened["inputs"])
        found = self.store.find(pipelib__key=key, pipelib__inputs=inputs, pipelib__stage="pipeline")
        tags = {"pipelib.key": key, "pipelib.inputs": inputs, "pipelib.stage": "pipeline", **_source("dvc repro")}
        return str(found.info.run_id) if found else self._create(tags, key)

    def _find_child(self) -> tuple[str, bool, dict[str, float]]:
        """The child, whether it has nothing yet, and the final numbers it showed as a place-holder for this stage."""
        family = {"mlflow.parentRunId": self.parent, "pipelib.stage": self.stage}
        own = {"pipelib.fingerprint": self.opened["fingerprint"], "pipelib.record": self.opened["record"]}
        found = self.store.find(pipelib__record=self.opened["record"])
        if found:
            if found.data.tags.get("mlflow.parentRunId") != self.parent:  # the user deleted its parent
                self.client.set_tag(found.info.run_id, "mlflow.parentRunId", self.parent)
            return str(found.info.run_id), False, {}
        if self.store.find(deleted=True, pipelib__record=self.opened["record"]):
            say("the run of this record was deleted in MLflow, so a new one begins there, with everything so far.")
        holder = self.store.find(mlflow__parentRunId=self.parent, pipelib__stage=self.stage, dvc__cached="true")
        if holder and "pipelib.record" not in holder.data.tags:
            run = str(holder.info.run_id)
            for name, value in own.items():
                self.client.set_tag(run, name, value)
            self.client.delete_tag(run, "dvc.cached")
            return run, False, dict(holder.data.metrics)
        return self._create({**family, **own, **_source(f"stages/{self.stage}.py")}, self.stage), True, {}

    def _create(self, tags: Mapping[str, str], name: str) -> str:
        began = round(self.opened["began"] * 1000)
        return str(self.client.create_run(self.store.experiment, began, dict(tags), name).info.run_id)

    def _begin(self) -> None:
        tags, params = dict(self.opened["tags"]), self.opened["params"]
        for run, own in ((self.parent, params), (self.child, _own(params, self.stage))):
            self._log(run, params=own, tags=tags)
            self._accepted(run, self.client.update_run, run, status="RUNNING")

    def _fill(self, run: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Add what a run has not; what it shows, a later stage may have said."""
        data = self.client.get_run(run).data
        self._log(
            run,
            params={name: value for name, value in params.items() if _name(name) not in data.params},
            tags={name: value for name, value in tags.items() if _name(name) not in data.tags},
        )

    def _tag(self, tags: Mapping[str, Any], replay: bool) -> None:
        for run in (self.child, self.parent):
            if replay:
                self._fill(run, {}, tags)
            else:
                self._log(run, tags=tags)

    def _summarize(self, event: Event) -> None:
        """Complete the parent: a child for every stage that DVC skipped, all final metrics, the model's digest."""
        at = round(event["time"] * 1000)
        for stage, metrics in event["metrics"].items():
            self._log_finals(self.parent, metrics, at)
            with self.store.place.turn():
                found = self.store.find(mlflow__parentRunId=self.parent, pipelib__stage=stage)
                cached = found is None or "dvc.cached" in found.data.tags
                tags = {"mlflow.parentRunId": self.parent, "pipelib.stage": stage, "dvc.cached": "true"}
                child = str(found.info.run_id) if found else self._create(tags, stage)
            if cached:
                self._fill(child, _own(self.opened["params"], stage), {})
                self._log_finals(child, metrics, at)
                self._accepted(child, self.client.set_terminated, child, end_time=at)
            if stage == "train":
                self._log(child, tags=event["model"])
                self._send_texts(child, event)
        self._log(self.parent, tags={**event["model"], **event.get("tags", {})})
        self._send_texts(self.parent, event)

    def _send_texts(self, run: str, event: Event) -> None:
        for name, text in event.get("texts", {}).items():
            self._send_file(run, {"name": name, "text": text}, replay=True)

    def _log_finals(self, run: str, metrics: Mapping[str, float], at: int) -> None:
        had = self.client.get_run(run).data.metrics
        self._log(
            run, points=[(_name(k), 0, at, float(v)) for k, v in metrics.items() if had.get(_name(k)) != float(v)]
        )

    def _log(
        self, run: str, points: list[Point] | None = None, params: Event | None = None, tags: Event | None = None
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics = [Metric(name, value, at, step) for name, step, at, value in points or ()]
        texts = [Param(_name(name), _text(value)) for name, value in (params or {}).items()]
        marks = [RunTag(_name(name), _text(value)) for name, value in (tags or {}).items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limits: 1000 points, 100 parameters, 100 tags a call
            self._accepted(run, self.client.log_batch, run, metrics=metrics[start : start + 1000])
            self.points_sent += len(metrics[start : start + 1000])
        for start in range(0, max(len(texts), len(marks)), 100):
            part = slice(start, start + 100)
            self._accepted(run, self.client.log_batch, run, params=texts[part], tags=marks[part])

    def _files_had(self, run: str) -> dict[str, int | None]:
        """The sizes of a run's files, by name."""
        if run not in self._files:
            self._files[run] = {}
            waiting: list[str | None] = [] if run == self.child and self._is_new else [None]
            while waiting:
                for entry in self.client.list_artifacts(run, waiting.pop()):
                    if entry.is_dir:
                        waiting.append(entry.path)
                    else:
                        self._files[run][entry.path] = entry.file_size
        return self._files[run]

    def _send_file(self, run: str, event: Event, replay: bool) -> None:
        """Send a small file or text. Files may be kept elsewhere than numbers, and refused where those are taken."""
        if not self.takes_files:
            return
        try:
            self._offer_file(run, event, replay)
        except DeletedRun:
            raise
        except Exception as error:
            self.client.get_run(run)  # raises where not only files are refused
            self.takes_files = False
            if not self.store.said_no_files:
                self.store.said_no_files = True
                say(
                    f"MLflow takes no files ({brief(error)}), so those of this run are only on this disk; the rest goes on. Give "
                    f"access to where it keeps them, then `pipelib track --replay {self.opened['key']}` sends them."
                )

    def _offer_file(self, run: str, event: Event, replay: bool) -> None:
        """Send a file; on a replay only if MLflow has none of that name and size, as after a kill."""
        name, path, text = str(event["name"]), event.get("path"), event.get("text")
        picture = None
        if path is not None:
            if not Path(path).is_file():
                if not (replay and name in self._files_had(run)):
                    self.files_gone.append(name)
                return
            try:
                text = redact(Path(path).read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                picture = Path(path)
        size = picture.stat().st_size if picture else len(str(text).encode("utf-8"))
        if replay and self._files_had(run).get(name) == size:
            return
        self.files_sent += 1
        if picture:
            self._accepted(run, self.client.log_artifact, run, str(picture), posixpath.dirname(name) or None)
        else:
            self._accepted(run, self.client.log_text, run, text, name)

    def _send_input(self, name: str, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"path": name, "sha256": digest})
        dataset = Dataset(name, digest[:36], "local", source)  # MLflow's digests end at 36 characters
        context = {"train": "training", "evaluate": "evaluation"}.get(self.stage, self.stage)
        tags = [InputTag("mlflow.data.context", context)]
        self._accepted(self.child, self.client.log_inputs, self.child, [DatasetInput(dataset, tags)])

    def _accepted(self, run: str, call: Callable[..., object], *arguments: object, **named: object) -> None:
        """Call, and pass over what MLflow refuses as invalid: sent again, it would be refused again.

        Raises:
            DeletedRun: it takes nothing since the user deleted the run.
        """
        try:
            call(*arguments, **named)
        except Exception as error:
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            if self.client.get_run(run).info.lifecycle_stage == "deleted":
                raise DeletedRun from error
            if not self._refused:
                self._refused = True
                say(
                    f"MLflow refuses a part of this run ({brief(error)}), so that is only in the record; the rest goes on."
                )


def set_status(client: Any, run: str, end: Event) -> None:
    """Have a run show how it ended, if it does not."""
    at = round(end["time"] * 1000)
    info = client.get_run(run).info
    if (info.status, info.end_time) != (end["status"].upper(), at):
        client.set_terminated(run, end["status"].upper(), end_time=at)


def _source(name: str) -> dict[str, str]:
    """What MLflow shows as the source of a run."""
    return {"mlflow.source.name": name, "mlflow.source.type": "LOCAL"}


def _name(key: str) -> str:
    """A name that MLflow allows: `acc,none` becomes `acc_none`."""
    return re.sub(r"[^\w/.\- :]", "_", key)[:250]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _own(params: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name.split(".")[0] in STAGES[stage].sections}
