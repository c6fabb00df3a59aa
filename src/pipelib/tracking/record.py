"""A run's own record: a file of JSON lines without secrets. It is the source of truth; MLflow has a copy.

    STATE/records/KEY/STAGE-FINGERPRINT.jsonl    one object per line: {"time", "event", ...}, time in seconds since 1970

KEY names one pass through the pipeline: DVC's experiment name, else the hash of all parameters and code.
"""

import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipelib.errors import UserError, tell
from pipelib.files import write_text

_SECRET_NAMES = re.compile(
    r"(?:^|_)(?:TOKEN|PASSWORD|PASSWD|SECRET|KEY|CREDENTIALS?)(?:_|$)|(?:PASSWORD|_PWD)$", re.IGNORECASE
)
_LOGIN = re.compile(r"[^:]*://(?P<login>[^:@]*:(?P<password>.*)@)")
"""User and password of a URL, up to the last @. Also matches a malformed URL whose password was not percent-encoded."""
OLD_NAMES = {"train/lr": "train/learning_rate", "val/loss": "val_loss", "val/perplexity": "val_perplexity"}
"""Names of metrics in earlier records, and their names of today."""
_SECRET_SHAPES = (
    # user:password@ of a URL, up to the last @: unless digits and a slash follow the colon (a port), it is a password
    (re.compile(r"(?<=://)(?:[^/\s:@]*:(?!\d*/)[^\s\"'`<>]*|[^/\s]*)@"), "***@"),
    (
        re.compile(
            r"([?&](?:[^=&\s]*(?:token|secret|password|signature|key)[^=&\s]*|sig|pwd)=)[^&\s\"']+", re.IGNORECASE
        ),
        r"\1***",
    ),
    (
        re.compile(r"((?:\b|(?<=%3B))(?:pwd|password)%3D)(?:%(?!3B|26)|[^%&\s\"'])+", re.IGNORECASE),
        r"\1***",
    ),  # in an ODBC string
    (re.compile(r"(\bpwd=)[^;&\s\"']+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\b(?:[A-Z0-9]+_)*(?:TOKEN|SECRET|KEY)=)[^\s\"']+"), r"\1***"),  # in a shell: API_TOKEN=...
    # in a configuration: password = ..., or "secret_key": "..."
    (
        re.compile(
            r"\b([\w-]*(?:password|passwd|passphrase|(?:secret|access|account|api)_key|connection_string"
            r"|client_secret|(?:sas|api|auth|access)_token)[\"']?\s*[=:]\s*)"
            r"""("[^"]*"|'[^']*'|[^\s"']+)""",
            re.IGNORECASE,
        ),
        r"\1***",
    ),
    (re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-)\w{16,}"), "***"),
)


def redact(text: str) -> str:
    """`text` without secrets: values of environment variables with names such as TOKEN, credentials in URLs, known tokens."""
    secrets = {value for name, value in os.environ.items() if _names_a_secret(name)}
    login = _LOGIN.match(os.environ.get("MLFLOW_TRACKING_URI", ""))
    password = ""
    if login:
        text, password = text.replace(login["login"], "***@"), login["password"]
    for secret in sorted(secrets | {password, unquote(password)}, key=len, reverse=True):
        if len(secret) >= 6:  # a short value such as "true" is not a secret, and is part of many words
            text = text.replace(secret, "***")
    for shape, replacement in _SECRET_SHAPES:
        text = shape.sub(replacement, text)
    return text


@cache  # a line of a record has many texts, and an environment many variables
def _names_a_secret(variable: str) -> bool:
    return bool(_SECRET_NAMES.search(variable))


def _redacted(value: object) -> object:
    """A JSON value with every text in it redacted; nan and infinities become text, since JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {redact(str(key)): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else redact(str(value))


def say(text: str) -> None:
    """Print a line about tracking, without secrets; see `tell`."""
    tell(f"tracking: {redact(text)}", error=True)


def brief(error: BaseException) -> str:
    """An error in one line, without secrets. A long one keeps its beginning and its end, where libraries put the cause."""
    line = next(
        iter(redact(str(error)).strip().splitlines()), ""
    )  # redact before cutting: half a secret would not be recognised
    if len(line) > 200:
        line = f"{line[:100]} ... {line[-100:]}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextmanager
def never_fail(what: str) -> Iterator[None]:
    """Turn an error in the block into one printed line: tracking never stops a stage.

    Args:
        what: what is not recorded then, with its verb: "this run is".
    """
    try:
        yield
    except Exception as error:
        # print our own messages in full, since the remedy is at their end
        why = str(error).removesuffix(".") if isinstance(error, UserError) else brief(error)
        say(f"{why}, so {what} not recorded; the stage continues, and its outs are complete without it.")


class Record:
    """One run's record. Whole lines are appended, never rewritten; several processes may append to one file."""

    def __init__(self, path: Path) -> None:
        """Open or create a record; raises OSError if that fails."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":  # a kill cut the last line; start a new one
            os.write(self._descriptor, b"\n")
        self._torn = False
        self._turn = threading.Lock()
        self.id = uuid.uuid4().hex
        self._points: dict[tuple[str, int | None], float] = {}
        for event in read_events(path)[0]:
            self.id = event.get("record", self.id)
            if event["event"] == "metrics":
                self._points |= {(name, event["step"]): float(value) for name, value in event["metrics"].items()}

    def append(self, event: str, **values: object) -> None:
        """Append one event; the operating system has it when this returns."""
        line = json.dumps(_redacted({"time": time.time(), "event": event, **values}), ensure_ascii=False)
        with self._turn:
            data = (
                b"\n" * self._torn + line.encode("utf-8", "replace") + b"\n"
            )  # after a partial write, start a new line
            self._torn = True
            self._torn = os.write(self._descriptor, data) < len(data)

    def append_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Append the metrics that are new: each (name, step) once; without a step, only values that changed."""
        known = self._points
        new = {
            name: float(value)
            for name, value in metrics.items()
            if (name, step) not in known or (step is None and known[name, step] != float(value))
        }
        if new:
            self.append("metrics", step=step, metrics=new)
            known |= {(name, step): value for name, value in new.items()}

    def last_step(self, name: str) -> int:
        """The last step at which a metric was recorded; 0 if there is none."""
        points = list(self._points)  # a copy, since other threads append too
        return max((step for known, step in points if known == name and step is not None), default=0)

    def close(self) -> None:
        """Close the file; a later append raises OSError."""
        with self._turn:
            os.close(self._descriptor)
            self._descriptor = -1  # another file may get its number


def read_events(path: Path, start: int = 0, end: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The events in the complete lines from byte `start` to byte `end`, and the offset of the next line.

    A line that a kill cut short is skipped. Metrics get their names of today.
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
            if event["event"] == "metrics":
                event["metrics"] = {OLD_NAMES.get(name, name): value for name, value in event["metrics"].items()}
            events.append(event)
    return events, start + data.rfind(b"\n") + 1


def prepare_record(path: Path, code: str, is_fresh: bool) -> None:
    """Make the record match the state: continue it, start a new one, or copy the points that another KEY recorded.

    The state of a stage depends only on its fingerprint, so a killed `dvc exp run` may resume under a new experiment's name;
    its new record then starts with the points so far. A stage that starts from scratch must not get the old points.
    """
    mixing = os.environ.get("PIPELIB_RESUME") == "continue"

    def continues(record: Path) -> bool:
        opened = [event for event in read_events(record)[0] if event["event"] == "open"]
        return not is_fresh and (mixing or (bool(opened) and opened[-1]["code"] == code))

    if path.exists():
        if not continues(path):
            # keep the old record, under another name
            path.rename(path.with_name(f"{path.stem}.until-{time.time_ns()}.jsonl"))
        return
    # copy texts and points from the newest record of another KEY with the same state
    others = sorted(path.parent.parent.glob(f"*/{path.name}"), key=lambda other: other.stat().st_mtime)
    for other in filter(continues, reversed(others)):
        kept = [e for e in read_events(other)[0] if e["event"] == "text" or e.get("step") is not None]
        write_text(path, "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept))
        return
