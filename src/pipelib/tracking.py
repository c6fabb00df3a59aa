"""What a stage records about its run, and where the run comes from.

The record (`record.py`) is the truth; MLflow (`mlflow_mirror.py`) is a view of it.
"""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelib.config import flatten, read_yaml
from pipelib.files import files_under, read_json, sha256_file, sha256_json
from pipelib.mlflow_mirror import LAST, SECTIONS, Mirror
from pipelib.provenance import code_hashes, git_state
from pipelib.record import Record, harmless, settle_record
from pipelib.state import state_root

ARTIFACT_BYTES = 5_000_000
"""Larger files are not copied to MLflow."""


class Run:
    """The record of one stage's run; leaving the `with` block records how it ended."""

    def __init__(self, stage: str, record: Record, mirror: Mirror | None, main: bool) -> None:
        """Args:
        main: this handle decides when the run has ended; others only add to it.
        """
        self.stage, self._record, self._mirror, self._main = stage, record, mirror, main

    @property
    def path(self) -> Path | None:
        """The record's file; None where there is none."""
        return self._record.path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._main:
            killed = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "finished" if error is None else "killed" if killed else "failed"
            if status == "finished" and self.stage == LAST:
                with harmless("the parent run's summary is"):
                    md5 = _out_md5s(["train"]).get("models")
                    model = {"dvc.md5.models": md5} if md5 else {}
                    self._record.append("summary", metrics={stage: _finals(stage) for stage in SECTIONS}, model=model)
            with harmless("the end of this run is"):
                self._record.append("end", status=status)
        if self._mirror:
            self._mirror.close()
        self._record.close()

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record numbers at a step, or final ones without it; a step that a key has already is left as it is."""
        with harmless(f"{', '.join(metrics)} at step {step} are"):
            self._record.append_metrics(metrics, step)

    def log_text(self, name: str, text: str) -> None:
        """Record a small text under a file's name, such as `samples/step-000100.txt`."""
        with harmless(f"{name} is"):
            self._record.append("text", name=name, text=text)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record what was decided while running; MLflow keeps the first value of each."""
        with harmless(f"{', '.join(params)} are"):
            self._record.append("params", params=params)

    def log_outs(self, final: Path) -> None:
        """Record finished outs: numbers in metrics/, small files in curves/ and reports/, of all others the digest.

        Args:
            final: a folder that mirrors the workspace.
        """
        with harmless(f"the outs in {final} are"):
            meta = final.with_name("meta.json")
            hashes: Mapping[str, str] = read_json(meta).get("final", {}) if meta.exists() else {}
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

    @property
    def path(self) -> None:
        """Nothing is recorded."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    def log_text(self, name: str, text: str) -> None: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_outs(self, final: Path) -> None: ...


def open_run(stage: str, params: object, fingerprint: str, code: Mapping[str, str]) -> Run:
    """The record of a stage's run, begun or gone on with, mirrored to MLflow where `logging.mlflow` says so.

    Args:
        params: all parameters, a dataclass with a section `logging` among its fields.
        fingerprint: of the stage's inputs.
        code: SHA-256 of the files that make the result, by path.

    Returns:
        A `NullRun`, after one line to standard error, where no record can be written.
    """
    with harmless("this run is"):
        flat = dict(flatten(params))
        decisive = {name: value for name, value in flat.items() if not name.startswith("logging.")}
        sources = {name: Path("stages") / f"{name}.py" for name in SECTIONS}
        hashes = {name: code_hashes(source, Path.cwd()) for name, source in sources.items() if source.exists()}
        inputs = sha256_json({"params": decisive, "code": hashes})
        key = re.sub(r"[^\w.-]", "_", os.environ.get("DVC_EXP_NAME") or inputs[:16])
        path = state_root().absolute() / "records" / key / f"{stage}-{fingerprint[:16]}.jsonl"
        digest = sha256_json(dict(code))
        settle_record(path, digest)
        record, start = Record(path), path.stat().st_size
        tags = _lineage(stage) | {name: value for name, value in flat.items() if name.startswith("logging.")}
        record.append(
            "open", record=record.id, key=key, inputs=inputs, stage=stage, fingerprint=fingerprint, code=digest,
            params=decisive, tags=tags,
        )  # fmt: skip
        if "data.fingerprint" in tags:
            record.append("input", name="data/tokens", digest=tags["data.fingerprint"])
        mirror = None
        if flat["logging.mlflow"]:
            mirror = Mirror(path, start, Path(os.environ.get("DVC_ROOT", ".")).absolute() / "mlflow.db")
        return Run(stage, record, mirror, main=True)
    return NullRun()


def attach_run(stage: str, path: Path | None) -> Run:
    """A second handle on a run that another process holds open, by its `path`.

    It adds to the record, and leaves mirroring and the end to the first.
    """
    if path is not None:
        with harmless("this rank's part of the run is"):
            return Run(stage, Record(path), None, main=False)
    return NullRun()


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
