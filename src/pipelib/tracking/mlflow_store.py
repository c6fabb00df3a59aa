"""The database or server where MLflow keeps the runs, and the experiment in it."""

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipelib.tracking.record import brief, say
from pipelib.workspace.locks import locked
from pipelib.workspace.places import StatePlaces, mlflow_database

EXPERIMENT = "pipelib"
EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # MLflow's name for model training, as opposed to chats
    "mlflow.note.content": "A run here is a pass through the pipeline; each of its stages is a run below it. "
    "Comparing the upper ones is enough.",
}
LOCAL_WAIT_SECONDS, SERVER_WAIT_SECONDS = 10.0, 0.8
"""The longest that the end of a stage waits: for a local database, and for a server, which may cost a second in all."""

LOCK_SECONDS = 5.0
"""How long to wait for another writer before a database counts as locked; MLflow itself would wait for 20 s."""


@dataclass(frozen=True)
class TrackingUri:
    """The address of a database or server. Nothing is opened yet."""

    uri: str
    database: Path | None
    """The SQLite file of this repository, if the address is that."""

    @classmethod
    def chosen(cls) -> "TrackingUri":
        """`$MLFLOW_TRACKING_URI`, else mlflow.db in the workspace that started DVC."""
        database = mlflow_database()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return cls(uri, None) if uri else cls(sqlite_uri(database), database)

    @property
    def is_local(self) -> bool:
        """Whether this is a file or folder, not a server. Except for Databricks, MLflow takes whatever is not a URL as a path."""
        scheme, colon, _ = self.uri.lower().partition(":")
        if not colon or "/" in scheme:
            return not scheme.startswith("databricks")
        return scheme.partition("+")[0] in ("", "file", "sqlite")

    @property
    def wait_seconds(self) -> float:
        """How long the end of a stage waits: `$PIPELIB_TRACKING_WAIT`, else the default for a local database or a server."""
        default = LOCAL_WAIT_SECONDS if self.is_local else SERVER_WAIT_SECONDS
        value = os.environ.get("PIPELIB_TRACKING_WAIT", "")
        if not value:
            return default
        if re.fullmatch(r"\d+(\.\d*)?|\.\d+", value):
            return float(value)
        say(
            f"PIPELIB_TRACKING_WAIT={value} is not a number of seconds, so {default:g} s is used; set a number, or unset it."
        )
        return default

    def open(self) -> "Store":
        """Connect. Takes seconds: MLflow is imported, and a new database is created.

        Raises:
            Exception: any error of MLflow, the network or the file system; `advice` explains some of them.
        """
        prepare_mlflow()
        _require_answer(self.uri)
        _require_writable(self.uri)
        from mlflow import MlflowClient

        # One process at a time: two that create the database at once break each other.
        with self.lock():
            if self.database and not self.database.exists():
                _make_whole(self.database, lambda fresh: MlflowClient(sqlite_uri(fresh)))
            return Store(self, MlflowClient(self.uri), _artifacts(self.database) if self.database else None)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock under which processes of this workspace create a database, an experiment or a run."""
        with locked(StatePlaces.chosen().mlflow_lock, wait=True, quiet=True):
            yield


def sqlite_uri(database: Path) -> str:
    """The SQLAlchemy URL of a database file. SQLAlchemy ends the path at a `?` and decodes every `%41` in it.

    MLflow creates the folder of a `sqlite:///...` URL without decoding its name, but not that of a `sqlite+pysqlite:` URL, so a
    path with special characters needs the latter.
    """
    path = str(database).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}" if path == str(database) else f"sqlite+pysqlite:///{path}"


def _artifacts(database: Path) -> str:
    """Where MLflow stores the files of a database's runs: a path, or a URI if MLflow would decode the path."""
    folder = database.with_name("mlartifacts")
    return folder.as_uri() if "%" in str(folder) else str(folder)


class Store:
    """An open connection, and the experiment that runs go to: `pipelib`, or `pipelib-2` if the user deleted the first.

    A deleted experiment keeps its name in MLflow and accepts no runs, so the next free name is used. A restored one is used
    again.
    """

    def __init__(self, tracking_uri: TrackingUri, client: Any, artifacts: str | None) -> None:
        """Args:
        client: an `MlflowClient`.
        artifacts: where a new experiment stores its files; None lets the server decide.
        """
        self.tracking_uri, self.client = tracking_uri, client
        self.warned_no_files = False
        """Whether the user was told that files are refused here; once is enough for all runs."""
        found: list[Any] = []
        while each := client.get_experiment_by_name(_name(len(found) + 1)):
            found.append(each)
        self.experiments = [str(each.experiment_id) for each in found]
        """Ids of all our experiments, deleted ones included."""
        active = next((each for each in found if each.lifecycle_stage == "active"), None)
        if active is None:
            name = _name(len(found) + 1)
            self.experiment = str(client.create_experiment(name, artifacts, EXPERIMENT_TAGS))
            self.experiments.append(self.experiment)
            if found:
                say(
                    f"the experiment {EXPERIMENT} was deleted in MLflow, so runs go to {name}; to restore the old one: "
                    f"mlflow experiments restore --experiment-id {self.experiments[0]}"
                )
        else:
            self.experiment = str(active.experiment_id)
            if "mlflow.experimentKind" not in active.tags:  # created by an earlier version
                for tag, text in EXPERIMENT_TAGS.items():
                    client.set_experiment_tag(self.experiment, tag, text)

    def find(self, deleted: bool = False, **tags: str) -> Any | None:
        """The latest run with these tags (`__` in a name stands for a dot), or None.

        Args:
            deleted: search the deleted runs instead.
        """
        from mlflow.entities import ViewType

        where = " and ".join(f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items())
        found = self.client.search_runs(
            self.experiments, where, ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY,
            max_results=1, order_by=["attributes.start_time DESC"],
        )  # fmt: skip
        return found[0] if found else None


def _name(number: int) -> str:
    """The name of the first experiment, or of a later one if those before it were deleted."""
    return EXPERIMENT if number == 1 else f"{EXPERIMENT}-{number}"


def advice(error: BaseException) -> str:
    """What the user can do about an error of MLflow; empty if unknown."""
    text = f"{type(error).__name__} {error}"
    known = (
        (
            "database schema",
            "another version of MLflow made it: if an older one, run `mlflow db upgrade URI`, else install that version",
        ),
        ("Can't locate revision", "a newer MLflow made it: install that version, or move the file away"),
        ("locked", "another program holds its lock: end that program, or wait"),
        ("readonly", "it is read-only: give write permission, or set MLFLOW_TRACKING_URI"),
        ("unable to open", "it cannot be opened: does the folder exist, and do you have permission?"),
        ("file is not a database", "it is not an SQLite database: move it away"),
        ("error code 401", "the server wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("error code 403", "this user has no permission"),
    )
    return next((remedy for words, remedy in known if words in text), "")


def failure(error: BaseException) -> str:
    """An error and its remedy, in brackets."""
    remedy = advice(error)
    return f"({brief(error)}{'; ' if remedy else ''}{remedy})"


def _require_answer(uri: str) -> None:
    """Raise OSError if an HTTP server does not answer, or answers with a server error; skip other stores.

    This runs before MLflow is imported, so an unreachable server costs a stage only this request, in a thread.
    """
    if not uri.lower().startswith(("http://", "https://")):
        return
    scheme, _, rest = uri.partition("://")
    try:
        timeout = float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        urllib.request.urlopen(f"{scheme}://{rest.rpartition('@')[2]}", timeout=timeout).close()
    except urllib.error.HTTPError as error:  # an answer; a client error such as 401 still means that the server works
        error.close()
        if error.code >= 500:
            raise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # MLflow has its own settings for certificates
            raise


def _require_writable(uri: str) -> None:
    """Raise sqlite3.Error if an existing SQLite file cannot be written now; MLflow would retry for minutes."""
    path = unquote(re.sub(r"^(sqlite(\+\w+)?:///)(file:)?|\?.*$", "", uri))
    if not uri.lower().startswith(("sqlite:", "sqlite+")) or not Path(path).exists():
        return
    import sqlite3  # not every Python has it

    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    finally:
        connection.close()


def _make_whole(database: Path, make: Callable[[Path], object]) -> None:
    """Create a database under a temporary name first: MLflow refuses a half-made one forever."""
    fresh = database.with_name(f".{database.name}.tmp")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    make(fresh)
    fresh.replace(database)


def prepare_mlflow() -> None:
    """Set variables that MLflow reads when imported, unless the user did. By default a call to a dead server takes minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # it would log tracebacks; we print one line
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the credentials in the URI
