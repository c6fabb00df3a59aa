"""A record in MLflow: a child run under the parent run of its KEY, sent event by event or completed later."""

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
"""The child's tag with the number of bytes of its record that MLflow has; set when the stage ends."""

Event = Mapping[str, Any]
Point = tuple[str, int, int, float]
"""MLflow's key, step, time in milliseconds, value."""


class DeletedRun(Exception):  # noqa: N818 (not an error, but the user's choice)
    """The user deleted this run in MLflow while it was being sent."""


class MlflowRun:
    """A record's child run in MLflow, and its parent; both are found by their tags, or created."""

    def __init__(self, store: Store, opened: Event) -> None:
        """Args:
        opened: the record's last `open` event, with the time `began` of the first.
        """
        self.client, self.store = store.client, store
        self.opened, self.stage = opened, str(opened["stage"])
        self.points_sent = self.files_sent = 0
        self.files_gone: list[str] = []
        """Files that are no longer on disk, so they cannot be sent."""
        self.accepts_files = True
        """False once MLflow has refused a file; no further ones are sent."""
        self._warned_refused = False
        with store.tracking_uri.lock():
            self.parent = self._find_parent()
            self.child, self._is_new, shown = self._find_child()
        self._earlier_points: set[tuple[str, int, int]] = set()
        self._placeholder_metrics: dict[str, float] = (
            shown  # the final metrics of the placeholder run, if there was one
        )
        self._files: dict[str, dict[str, int | None]] = {}
        data = self.client.get_run(self.child).data
        self._child_params, self._child_tags = dict(data.params), dict(data.tags)
        for name in () if self._is_new else data.metrics:
            self._earlier_points |= {
                (name, point.step, point.timestamp) for point in self.client.get_metric_history(self.child, name)
            }

    def send(self, events: Sequence[Event], replay: bool) -> None:
        """Send events of the record to MLflow.

        Args:
            replay: the events are from before this process opened the record. MLflow may have them already, and values that
                it has from later events are kept.
        """
        # All points go in one batch. Final metrics that the placeholder run already shows are left out.
        points = [
            (_name(key), event["step"] or 0, round(event["time"] * 1000), float(value))
            for event in events
            if event["event"] == "metrics"
            for key, value in event["metrics"].items()
            if event["step"] is not None or self._placeholder_metrics.get(_name(key)) != float(value)
        ]
        self._log(self.child, points=[point for point in points if point[:3] not in self._earlier_points])
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
                # On a replay, `complete` does the rest: these would overwrite what later stages set.
                case {"event": "open"} if not replay:
                    self._begin()
                case {"event": "summary"} if not replay:
                    self._summarize(event)
                case {"event": "end", "status": status, "time": at} if not replay:
                    for run in (self.child, self.parent):
                        self._call(run, self.client.set_terminated, run, status.upper(), round(at * 1000))

    def complete(self, events: Sequence[Event]) -> None:
        """Send a whole record: also the parts of `send` that only a live run sends, and how the child ended."""
        self._add_missing(self.parent, self.opened["params"], self.opened["tags"])
        self._add_missing(self.child, _stage_params(self.opened["params"], self.stage), self.opened["tags"])
        self.send(events, replay=True)
        for summary in [event for event in events if event["event"] == "summary"][-1:]:
            self._summarize(summary)
        ends = [event for event in events if event["event"] == "end"]
        if ends:
            set_status(self.client, self.child, ends[-1])

    def mark_sent(self, size: int) -> None:
        """Note in MLflow that it has the record's first `size` bytes, unless files are missing."""
        if self.accepts_files:
            self._log(self.child, tags={SENT: str(size)})

    def _find_parent(self) -> str:
        key, inputs = str(self.opened["key"]), str(self.opened["inputs"])
        found = self.store.find(pipelib__key=key, pipelib__inputs=inputs, pipelib__stage="pipeline")
        tags = {"pipelib.key": key, "pipelib.inputs": inputs, "pipelib.stage": "pipeline", **_source("dvc repro")}
        return str(found.info.run_id) if found else self._create(tags, key)

    def _find_child(self) -> tuple[str, bool, dict[str, float]]:
        """The child's id, whether it is new, and the final metrics that it had as the placeholder of a skipped stage."""
        family = {"mlflow.parentRunId": self.parent, "pipelib.stage": self.stage}
        own = {"pipelib.fingerprint": self.opened["fingerprint"], "pipelib.record": self.opened["record"]}
        found = self.store.find(pipelib__record=self.opened["record"])
        if found:
            if (
                found.data.tags.get("mlflow.parentRunId") != self.parent
            ):  # its parent was deleted, and a new one created
                self.client.set_tag(found.info.run_id, "mlflow.parentRunId", self.parent)
            return str(found.info.run_id), False, {}
        if self.store.find(deleted=True, pipelib__record=self.opened["record"]):
            say("the run of this record was deleted in MLflow, so a new one is created there, with everything so far.")
        # The last stage of an earlier run may have added a placeholder for this stage: take it over.
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
        for run, own in ((self.parent, params), (self.child, _stage_params(params, self.stage))):
            self._log(run, params=own, tags=tags)
            self._call(run, self.client.update_run, run, status="RUNNING")

    def _add_missing(self, run: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Add the parameters and tags that a run lacks. Keep those it has: a later stage may have set them."""
        data = self.client.get_run(run).data
        self._log(
            run,
            params={name: value for name, value in params.items() if _name(name) not in data.params},
            tags={name: value for name, value in tags.items() if _name(name) not in data.tags},
        )

    def _tag(self, tags: Mapping[str, Any], replay: bool) -> None:
        for run in (self.child, self.parent):
            if replay:
                self._add_missing(run, {}, tags)
            else:
                self._log(run, tags=tags)

    def _summarize(self, event: Event) -> None:
        """Complete the parent: add a child for every stage that DVC skipped, all final metrics, and the model's digest."""
        at = round(event["time"] * 1000)
        # The last stage's first: MLflow's comparison begins with the first metric, and those of early stages seldom differ.
        for metrics in reversed(event["metrics"].values()):
            self._log_finals(self.parent, metrics, at)
        for stage, metrics in event["metrics"].items():
            with self.store.tracking_uri.lock():
                found = self.store.find(mlflow__parentRunId=self.parent, pipelib__stage=stage)
                cached = found is None or "dvc.cached" in found.data.tags
                tags = {"mlflow.parentRunId": self.parent, "pipelib.stage": stage, "dvc.cached": "true"}
                child = str(found.info.run_id) if found else self._create(tags, stage)
            if cached:
                self._add_missing(child, _stage_params(self.opened["params"], stage), {})
                self._log_finals(child, metrics, at)
                self._call(child, self.client.set_terminated, child, end_time=at)
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
            self._call(run, self.client.log_batch, run, metrics=metrics[start : start + 1000])
            self.points_sent += len(metrics[start : start + 1000])
        for start in range(0, max(len(texts), len(marks)), 100):
            part = slice(start, start + 100)
            self._call(run, self.client.log_batch, run, params=texts[part], tags=marks[part])

    def _remote_files(self, run: str) -> dict[str, int | None]:
        """The sizes of the files that a run has in MLflow, by name."""
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
        """Send a small file or text. MLflow may store files elsewhere than metrics, so it can refuse only the files."""
        if not self.accepts_files:
            return
        try:
            self._upload_file(run, event, replay)
        except DeletedRun:
            raise
        except Exception as error:
            self.client.get_run(run)  # raises if MLflow refuses everything, not only files
            self.accepts_files = False
            if not self.store.warned_no_files:
                self.store.warned_no_files = True
                say(
                    f"MLflow refuses files ({brief(error)}), so the files of this run are only on this disk; the rest is still "
                    f"sent. Give access to its file store, then `pipelib track --replay {self.opened['key']}` sends them."
                )

    def _upload_file(self, run: str, event: Event, replay: bool) -> None:
        """Send a file; on a replay, only if MLflow has no file of this name and size."""
        name, path, text = str(event["name"]), event.get("path"), event.get("text")
        picture = None
        if path is not None:
            if not Path(path).is_file():
                if not (replay and name in self._remote_files(run)):
                    self.files_gone.append(name)
                return
            try:
                text = redact(Path(path).read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                picture = Path(path)
        size = picture.stat().st_size if picture else len(str(text).encode("utf-8"))
        if replay and self._remote_files(run).get(name) == size:
            return
        self.files_sent += 1
        if picture:
            self._call(run, self.client.log_artifact, run, str(picture), posixpath.dirname(name) or None)
        else:
            self._call(run, self.client.log_text, run, text, name)

    def _send_input(self, name: str, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"path": name, "sha256": digest})
        dataset = Dataset(name, digest[:36], "local", source)  # MLflow allows 36 characters
        context = {"train": "training", "evaluate": "evaluation"}.get(self.stage, self.stage)
        tags = [InputTag("mlflow.data.context", context)]
        self._call(self.child, self.client.log_inputs, self.child, [DatasetInput(dataset, tags)])

    def _call(self, run: str, call: Callable[..., object], *arguments: object, **named: object) -> None:
        """Call MLflow, and skip what it refuses as invalid, since it would refuse it again.

        Raises:
            DeletedRun: MLflow refuses everything because the user deleted the run.
        """
        try:
            call(*arguments, **named)
        except Exception as error:
            if getattr(error, "error_code", None) != "INVALID_PARAMETER_VALUE":
                raise
            if self.client.get_run(run).info.lifecycle_stage == "deleted":
                raise DeletedRun from error
            if not self._warned_refused:
                self._warned_refused = True
                say(
                    f"MLflow refuses a part of this run ({brief(error)}), so that is only in the record; the rest is still sent."
                )


def set_status(client: Any, run: str, end: Event) -> None:
    """Set the final status and end time of a run, if they differ."""
    at = round(end["time"] * 1000)
    info = client.get_run(run).info
    if (info.status, info.end_time) != (end["status"].upper(), at):
        client.set_terminated(run, end["status"].upper(), end_time=at)


def _source(name: str) -> dict[str, str]:
    """The tags that MLflow shows as the source of a run."""
    return {"mlflow.source.name": name, "mlflow.source.type": "LOCAL"}


def _name(key: str) -> str:
    """Turn a key into a name that MLflow allows: `acc,none` becomes `acc_none`."""
    return re.sub(r"[^\w/.\- :]", "_", key)[:250]


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _stage_params(params: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name.split(".")[0] in STAGES[stage].sections}
