"""What a stage records about its run, and where the run comes from.

The record (`record.py`) is the truth; MLflow (`mirror.py`) is a view of it.
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
from pipelib.tracking.mlflow_store import Place
from pipelib.tracking.page import model_reference, pipeline_page, stage_page
from pipelib.tracking.record import Record, harmless, read_events, settle_record
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
"""Of the changes that are in no commit so much is recorded."""


__all__ = ["NullRun", "Run", "attach_run", "is_mirroring", "open_run"]


class Run(Protocol):
    """What a stage tells of its run; leaving the `with` block tells how it ended."""

    @property
    def path(self) -> Path | None:
        """The record's file; None where there is none."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or final ones without it; a step that a key has already is left as it is."""

    def log_text(self, name: str, text: str) -> None:
        """Record a small text under a file's name, such as `samples/step-000100.txt`."""

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record what was decided while running; MLflow keeps the first value of each."""

    def log_outs(self, final: Path) -> None:
        """Record finished outs: numbers in metrics/, small files in curves/ and reports/, of all others the digest.

        Args:
            final: a folder that mirrors the workspace.
        """


class NullRun:
    """A run that nothing is told of: for ranks other than the first, and where no record can be written."""

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
    """A run with a record, mirrored to MLflow or not."""

    def __init__(self, stage: str, record: Record, mirror: Mirror | None, opened: Mapping[str, Any] | None) -> None:
        """Args:
        opened: what the run is, for the handle that decides when it has ended; others only add to it.
        """
        self.stage, self._record, self._mirror, self._opened = stage, record, mirror, opened
        self._sampler = None
        if opened:
            with harmless("the state of the machine is"):
                self._sampler = Sampler(self.log, record.last_step(CPU) + 1)

    @property
    def path(self) -> Path | None:
        """The record's file; None where there is none."""
        return self._record.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sampler:
            self._sampler.close()
        if self._opened:
            killed = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "finished" if error is None else "killed" if killed else "failed"
            if status == "finished" and self.stage == LAST:
                with harmless("the parent run's summary is"):
                    self._record.append("summary", **_summary(self._opened))
            with harmless("the end of this run is"):
                self._record.append("end", status=status)
        if self._mirror:
            self._mirror.close()
        self._record.close()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `Run`."""
        with harmless(f"{', '.join(metrics)} at step {step} are"):
            self._record.append_metrics(metrics, step)

    def log_text(self, name: str, text: str) -> None:
        """See `Run`."""
        with harmless(f"{name} is"):
            self._record.append("text", name=name, text=text)

    def log_params(self, params: Mapping[str, object]) -> None:
        """See `Run`."""
        with harmless(f"{', '.join(params)} are"):
            self._record.append("params", params=params)

    def log_outs(self, final: Path) -> None:
        """See `Run`."""
        with harmless(f"the outs in {final} are"):
            hashes = finished_files(final.parent)
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
    """The record of a stage's run, begun or gone on with, mirrored to MLflow where `logging.mlflow` says so.

    Args:
        params: all parameters, a dataclass with a section `logging` among its fields.
        fingerprint: of the stage's inputs.
        code: what makes the result: see `provenance.code_hashes`.
        is_fresh: the stage has nothing to go on with, so what was recorded before is another run's.

    Returns:
        A `NullRun`, after one line to standard error, where no record can be written.
    """
    with harmless("this run is"):
        flat = dict(flatten(params))
        inputs = _inputs_of_all(flat)
        path = _record_of(stage, inputs, fingerprint)
        key = path.parent.name
        digest = sha256_json(dict(code))
        settle_record(path, digest, is_fresh)
        record, start = Record(path), path.stat().st_size
        tags = _lineage(stage) | {name: value for name, value in flat.items() if name.startswith("logging.")}
        opened = {
            "record": record.id, "key": key, "inputs": inputs, "stage": stage, "fingerprint": fingerprint,
            "code": digest, "params": _decisive(flat), "tags": tags,
        }  # fmt: skip
        record.append("open", **opened)
        for name, manifest_sha256 in _inputs(stage).items():
            record.append("input", name=name, digest=manifest_sha256)
        if tags.get("git.dirty") == "true":
            record.append("text", name="uncommitted.diff", text=uncommitted_changes(Path.cwd(), DIFF_BYTES))
        mirror = None
        if flat["logging.mlflow"]:
            with harmless("MLflow's view of this run is"):
                mirror = Mirror(path, start, Place.chosen())
                mirror.start()
        return RecordedRun(stage, record, mirror, opened)
    return NullRun()


def is_recorded(stage: str, params: Mapping[str, object], fingerprint: str, code: Mapping[str, str]) -> bool:
    """Whether the record of a run of the pipeline says already that this stage has ended well with this code.

    Args:
        params: all of them, flat.
    """
    with harmless("what is recorded of this run is"):
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
    """A hash of what decides a run of the whole pipeline: the parameters, and the code of all stages."""
    code = {name: code_hashes(name, params) for name in STAGES if HERE.stage(name).exists()}
    return sha256_json({"params": _decisive(params), "code": code})


def _record_of(stage: str, inputs: str, fingerprint: str) -> Path:
    """The file of a stage's record."""
    key = re.sub(r"[^\w.-]", "_", os.environ.get("DVC_EXP_NAME") or inputs[:16])
    return StatePlaces.chosen().records.absolute() / key / f"{stage}-{fingerprint[:16]}.jsonl"


def attach_run(stage: str, path: Path | None) -> Run:
    """A second handle on a run that another process holds open, by its `path`.

    It adds to the record, and leaves mirroring and the end to the first.
    """
    if path is not None:
        with harmless("this rank's part of the run is"):
            return RecordedRun(stage, Record(path), None, None)
    return NullRun()


def _lineage(stage: str) -> dict[str, Any]:
    """Tags that say where a run comes from: git, DVC's experiment, the digests of what the stages before it made."""
    git, before = git_state(Path.cwd()), [*upstream(stage)]
    if not git["dirty"] and any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents)):
        with harmless("the commit of this run is"):
            run_git(Path.cwd(), "rev-parse", "--git-dir")  # which says why: another user's repository, no git
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
    """The dataset that a stage reads, by its folder: the SHA-256 of the manifest, which names every file's."""
    folder = STAGES[stage].dataset
    digest = _sha256_of(Path(folder) / MANIFEST) if folder else ""
    return {folder: digest} if digest else {}


def _sha256_of(path: Path) -> str:
    return sha256_file(path) if path.exists() else ""


def _summary(opened: Mapping[str, Any]) -> dict[str, Any]:
    """What completes the parent: all stages' final metrics, the model's digest, the page, the model as a reference."""
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
    """DVC's md5 of the outs of stages that have ended, by path; a running stage's entry is absent or stale."""
    with harmless("DVC's digests are"):
        locked = read_lock()
        return {out.path: out.md5 for stage in stages if stage in locked for out in locked[stage].outs if out.md5}
    return {}


def _numbers(path: Path, prefix: str) -> dict[str, float]:
    """The numbers in a JSON file, by their dotted paths."""
    values = flatten(read_json(path), prefix)
    return {
        name: float(value) for name, value in values if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _finals(stage: str) -> dict[str, float]:
    """The final metrics of a stage as they lie in the workspace, whether it ran now or DVC found it cached."""
    files = {stage: HERE.result(stage), f"speed.{stage}": HERE.speed(stage)}
    return {
        name: value for prefix, path in files.items() if path.exists() for name, value in _numbers(path, prefix).items()
    }
