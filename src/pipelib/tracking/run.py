"""A stage's interface to tracking: what it records about its run, and the lineage of the run.

The record (`record.py`) is the source of truth; MLflow (`mirror.py`) has a copy.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pipelib.files import files_under, read_json, sha256_file, sha256_json
from pipelib.schema import flatten
from pipelib.tracking.mirror import Mirror, is_mirroring
from pipelib.tracking.mlflow_store import TrackingUri
from pipelib.tracking.page import model_reference, pipeline_page, stage_page
from pipelib.tracking.record import Record, never_fail, prepare_record, read_events
from pipelib.tracking.system_metrics import CPU, Sampler
from pipelib.workspace.dvc import read_lock
from pipelib.workspace.git import git_state, run_git, uncommitted_changes
from pipelib.workspace.places import HERE, MANIFEST, StatePlaces, containing_out
from pipelib.workspace.provenance import code_hashes
from pipelib.workspace.stages import LAST, STAGES, upstream
from pipelib.workspace.workdir import finished_files

ARTIFACT_BYTES = 5_000_000
"""Larger files are not copied to MLflow."""
DIFF_BYTES = 1_000_000
"""At most this much of the uncommitted changes is recorded."""


__all__ = ["NullRun", "Run", "attach_run", "is_mirroring", "open_run"]


class Run(Protocol):
    """What a stage can record about its run. Leaving the `with` block records how it ended."""

    @property
    def path(self) -> Path | None:
        """The path of the record; None without one."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics at a step, or final metrics without one. A value recorded earlier for the same name and step stays."""

    def log_text(self, name: str, text: str) -> None:
        """Record a small text under a file's name, such as `samples/step-000100.txt`."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record values decided while running; MLflow keeps the first value of each name."""

    def log_outs(self, final: Path) -> None:
        """Record finished outs: numbers of metrics/, small files of curves/ and reports/, and a digest of all others.

        Args:
            final: a folder laid out like the workspace.
        """


class NullRun:
    """A run that records nothing: for all ranks but the first, and if no record can be written."""

    path = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `Run`."""

    def log_text(self, name: str, text: str) -> None:
        """See `Run`."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """See `Run`."""

    def log_outs(self, final: Path) -> None:
        """See `Run`."""


class RecordedRun:
    """A run with a record, with or without a mirror to MLflow."""

    def __init__(self, stage: str, record: Record, mirror: Mirror | None, opened: Mapping[str, Any] | None) -> None:
        """Args:
        opened: the `open` event, for the handle that records the end of the run; None for one that only adds to it.
        """
        self.stage, self._record, self._mirror, self._opened = stage, record, mirror, opened
        self._sampler = None
        if opened:
            with never_fail("the state of the machine is"):
                self._sampler = Sampler(self.log, record.last_step(CPU) + 1)

    @property
    def path(self) -> Path | None:
        """The path of the record; None without one."""
        return self._record.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # `is_recorded` expects the end event to be the last one, so the sampler stops first
        if self._sampler:
            self._sampler.close()
        if self._opened:
            killed = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "finished" if error is None else "killed" if killed else "failed"
            if status == "finished" and self.stage == LAST:
                with never_fail("the parent run's summary is"):
                    self._record.append("summary", **_summary(self._opened))
            with never_fail("the end of this run is"):
                self._record.append("end", status=status)
        if self._mirror:
            self._mirror.close()
        self._record.close()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `Run`."""
        with never_fail(f"{', '.join(metrics)} at step {step} are"):
            self._record.append_metrics(metrics, step)

    def log_text(self, name: str, text: str) -> None:
        """See `Run`."""
        with never_fail(f"{name} is"):
            self._record.append("text", name=name, text=text)

    def log_params(self, params: Mapping[str, object]) -> None:
        """See `Run`."""
        with never_fail(f"{', '.join(params)} are"):
            self._record.append("params", params=params)

    def log_outs(self, final: Path) -> None:
        """See `Run`."""
        with never_fail(f"the outs in {final} are"):
            hashes = finished_files(final.parent)  # known already; hashing the data again would take long
            outs: dict[str, dict[str, str]] = {}
            for path in files_under(final):
                name = path.relative_to(final)
                sha256 = hashes.get(name.as_posix()) or sha256_file(path)
                if name.parts[0] == "metrics" and name.suffix == ".json":
                    self._record.append_metrics(_numbers(path, ".".join(name.with_suffix("").parts[1:])), None)
                elif name.parts[0] in ("metrics", "curves", "reports"):
                    if path.stat().st_size <= ARTIFACT_BYTES:
                        self._record.append("file", name=name.as_posix(), path=str(path.absolute()), sha256=sha256)
                else:
                    outs.setdefault(str(containing_out(name)), {})[name.as_posix()] = sha256
            tags = {}
            for out, files in outs.items():
                size = sum((final / name).stat().st_size for name in files)
                tags[f"out.{out}"] = f"sha256:{sha256_json(files)}, {len(files)} files, {size} bytes"
            tokens = HERE.tokens
            fingerprint = outs.get(str(tokens), {}).get(str(tokens / MANIFEST))
            tags |= {"data.fingerprint": fingerprint} if fingerprint else {}
            if tags:
                self._record.append("tags", tags=tags)


def open_run(stage: str, params: object, fingerprint: str, code: Mapping[str, str], *, is_fresh: bool = False) -> Run:
    """Start or continue the record of a stage's run, and mirror it to MLflow if `logging.mlflow` is true.

    Args:
        params: all parameters, a dataclass with a section `logging` among its fields.
        fingerprint: the fingerprint of the stage's inputs.
        code: the hashes of the stage's code: see `provenance.code_hashes`.
        is_fresh: the stage starts from scratch, so an existing record belongs to another run.

    Returns:
        The run; if no record can be written, a `NullRun`, after one line to standard error.
    """
    with never_fail("this run is"):
        flat = dict(flatten(params))
        inputs = _inputs_of_all(flat)
        path = _record_of(stage, inputs, fingerprint)
        key = path.parent.name
        digest = sha256_json(dict(code))
        prepare_record(path, digest, is_fresh)  # before the record is opened: it may rename the file
        record, start = Record(path), path.stat().st_size
        tags = _lineage(stage) | {name: value for name, value in flat.items() if name.startswith("logging.")}
        opened = {
            "record": record.id, "key": key, "inputs": inputs, "stage": stage, "fingerprint": fingerprint,
            "code": digest, "params": _decisive(flat), "tags": tags,
        }  # fmt: skip
        record.append("open", **opened)  # the mirror needs it, so it comes before the mirror
        for name, manifest_sha256 in _inputs(stage).items():
            record.append("input", name=name, digest=manifest_sha256)
        if tags.get("git.dirty") == "true":
            record.append("text", name="uncommitted.diff", text=uncommitted_changes(Path.cwd(), DIFF_BYTES))
        mirror = None
        if flat["logging.mlflow"]:
            with never_fail("MLflow's view of this run is"):
                mirror = Mirror(path, start, TrackingUri.chosen())
                mirror.start()
        return RecordedRun(stage, record, mirror, opened)
    return NullRun()


def is_recorded(stage: str, params: Mapping[str, object], fingerprint: str, code: Mapping[str, str]) -> bool:
    """Whether the record already says that this stage finished with this code.

    Args:
        params: all parameters, flat.
    """
    with never_fail("what is recorded of this run is"):
        path = _record_of(stage, _inputs_of_all(params), fingerprint)
        events = read_events(path)[0] if path.exists() else []
        opened = [event for event in events if event["event"] == "open"]
        ended = bool(events) and events[-1].get("status") == "finished"
        return ended and bool(opened) and opened[-1].get("code") == sha256_json(dict(code))
    return False


def _decisive(params: Mapping[str, object]) -> dict[str, object]:
    """The parameters that can change a result."""
    return {name: value for name, value in params.items() if not name.startswith("logging.")}


def _inputs_of_all(params: Mapping[str, object]) -> str:
    """A hash of everything that decides a run of the pipeline: the parameters and the code of all stages."""
    code = {name: code_hashes(name, params) for name in STAGES if HERE.stage(name).exists()}
    return sha256_json({"params": _decisive(params), "code": code})


def _record_of(stage: str, inputs: str, fingerprint: str) -> Path:
    """The path of a stage's record."""
    key = re.sub(r"[^\w.-]", "_", os.environ.get("DVC_EXP_NAME") or inputs[:16])
    return StatePlaces.chosen().records.absolute() / key / f"{stage}-{fingerprint[:16]}.jsonl"


def attach_run(stage: str, path: Path | None) -> Run:
    """A second handle on a run that another process has open, by the path of its record.

    It only adds to the record. The first handle mirrors it and records its end.
    """
    if path is not None:
        with never_fail("this rank's part of the run is"):
            return RecordedRun(stage, Record(path), None, None)
    return NullRun()


def _lineage(stage: str) -> dict[str, Any]:
    """Tags for the lineage of a run: the git commit, DVC's experiment, and the digests of earlier stages' outs."""
    git, before = git_state(Path.cwd()), [*upstream(stage)]
    if not git["dirty"] and any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents)):
        with never_fail("the commit of this run is"):
            run_git(
                Path.cwd(), "rev-parse", "--git-dir"
            )  # raises with the reason: another user's repository, or no git
    origin = {
        "git.commit": git["commit"], "git.dirty": git["dirty"], "dvc.exp_name": os.environ.get("DVC_EXP_NAME", ""),
        "dvc.exp_baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV", ""),
    }  # fmt: skip
    tags = {
        **origin, "mlflow.source.git.commit": git["commit"], "mlflow.note.content": stage_page(stage, origin),
        "data.fingerprint": _sha256_of(HERE.tokens / MANIFEST) if "tokenize" in before else "",
        **{f"dvc.md5.{path}": md5 for path, md5 in _out_md5s(before).items()},
    }  # fmt: skip
    return {tag: value for tag, value in tags.items() if value}


def _inputs(stage: str) -> dict[str, str]:
    """The dataset that a stage reads: its folder, and the SHA-256 of its manifest, which has the hashes of all files."""
    folder = STAGES[stage].dataset
    digest = _sha256_of(Path(folder) / MANIFEST) if folder else ""
    return {folder: digest} if digest else {}


def _sha256_of(path: Path) -> str:
    return sha256_file(path) if path.exists() else ""


def _summary(opened: Mapping[str, Any]) -> dict[str, Any]:
    """What completes the parent run: all final metrics, the model's digest and its reference, and the page."""
    tags: Mapping[str, str] = opened["tags"]
    lineage = {name: tags.get(name, "") for name in ("git.commit", "git.dirty", "dvc.exp_name", "dvc.exp_baseline_rev")}
    metrics = {stage: _finals(stage) for stage in STAGES}
    md5 = _out_md5s(["train"]).get("models", "")
    page = pipeline_page(
        {name: value for finals in metrics.values() for name, value in finals.items()}, lineage, md5,
        tags.get("data.fingerprint", ""), opened["params"],
    )  # fmt: skip
    return {
        "metrics": metrics,
        "model": {"dvc.md5.models": md5} if md5 else {},
        "tags": {"mlflow.note.content": page},
        "texts": {"model/reference.json": model_reference(md5, lineage)} if md5 else {},
    }


def _out_md5s(stages: Iterable[str]) -> dict[str, str]:
    """DVC's MD5 of the outs of finished stages, by path; the entry of a running stage is absent or stale."""
    with never_fail("DVC's digests are"):
        locked = read_lock()
        return {out.path: out.md5 for stage in stages if stage in locked for out in locked[stage].outs if out.md5}
    return {}


def _numbers(path: Path, prefix: str) -> dict[str, float]:
    """The numbers in a JSON file, by dotted path."""
    values = flatten(read_json(path), prefix)
    return {
        name: float(value) for name, value in values if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _finals(stage: str) -> dict[str, float]:
    """The final metrics of a stage from the workspace, whether it ran now or DVC took it from its cache."""
    files = {stage: HERE.result(stage), f"speed.{stage}": HERE.speed(stage)}
    return {
        name: value for prefix, path in files.items() if path.exists() for name, value in _numbers(path, prefix).items()
    }
