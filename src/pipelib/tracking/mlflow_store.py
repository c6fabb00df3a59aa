"""Where MLflow keeps the runs: the database or server, opened without harm to others, and the experiment in it."""

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
    "mlflow.experimentKind": "custom_model_development",  # MLflow's word for training a model, as against chats
    "mlflow.note.content": "A run here is a pass through the pipeline: download, tokenize, train, evaluate, each a run below it. "
    "Comparing the upper ones is enough.",
}
LOCAL_WAIT_SECONDS, SERVER_WAIT_SECONDS = 10.0, 0.8
"""The longest that the end of a stage waits for a database on this machine, or for a server, which may cost a second in all."""

LOCK_SECONDS = 5.0
"""How long somebody else may write to a database before it counts as locked; MLflow itself would wait for 20 s."""


@dataclass(frozen=True)
class Place:
    """A database or server, by its address; nothing is opened."""

    uri: str
    database: Path | None
    """The SQLite file of this repository, where that is the place."""

    @classmethod
    def chosen(cls) -> "Place":
        """`$MLFLOW_TRACKING_URI`, else mlflow.db in the workspace that started DVC."""
        database = mlflow_database()
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        return cls(uri, None) if uri else cls(sqlite_uri(database), database)

    @property
    def is_local(self) -> bool:
        """A file or folder on this machine, not a server; what is no URL is a path to MLflow, unless Databricks is meant."""
        scheme, colon, _ = self.uri.lower().partition(":")
        if not colon or "/" in scheme:
            return not scheme.startswith("databricks")
        return scheme.partition("+")[0] in ("", "file", "sqlite")

    @property
    def wait_seconds(self) -> float:
        """How long the end of a stage waits: `$PIPELIB_TRACKING_WAIT`, else what suits the place."""
        default = LOCAL_WAIT_SECONDS if self.is_local else SERVER_WAIT_SECONDS
        wish = os.environ.get("PIPELIB_TRACKING_WAIT", "")
        if not wish:
            return default
        if re.fullmatch(r"\d+(\.\d*)?|\.\d+", wish):
            return float(wish)
        say(f"PIPELIB_TRACKING_WAIT={wish} is no number of seconds, so {default:g} s count; give one, or unset it.")
        return default

    def open(self) -> "Store":
        """Connect; takes seconds, since MLflow is imported, and a new database made.

        Raises:
            Exception: whatever MLflow, the network or the file system raises; `advice` knows some of them.
        """
        prepare_mlflow()
        _require_answer(self.uri)
        _require_writable(self.uri)
        from mlflow import MlflowClient

        # Several processes that open a new database at once break each other.
        with self.turn():
            if self.database and not self.database.exists():
                _make_whole(self.database, lambda fresh: MlflowClient(sqlite_uri(fresh)))
            return Store(self, MlflowClient(self.uri), _artifacts(self.database) if self.database else None)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Nobody else of this workspace makes a database, an experiment or a run in this block."""
        with locked(StatePlaces.chosen().mlflow_lock, wait=True, quiet=True):
            yield


def sqlite_uri(database: Path) -> str:
    """A database's address for SQLAlchemy, which takes the path up to a `?` and decodes every `%41` in it.

    MLflow makes the folder of `sqlite:///...`, and does not decode its name; it leaves those of `sqlite+pysqlite:` alone.
    """
    path = str(database).replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{path}" if path == str(database) else f"sqlite+pysqlite:///{path}"


def _artifacts(database: Path) -> str:
    """Where the files of a database's runs go: a path, but as a URI where MLflow would decode it."""
    folder = database.with_name("mlartifacts")
    return folder.as_uri() if "%" in str(folder) else str(folder)


class Store:
    """An open connection, and the experiment that runs go to: `pipelib`, or `pipelib-2` where the user deleted that one.

    A deleted experiment keeps its name in MLflow and takes no run, so the next free name is used; restored, it is used
    again.
    """

    def __init__(self, place: Place, client: Any, artifacts: str | None) -> None:
        """Args:
        client: an `MlflowClient`.
        artifacts: where a new experiment keeps its files; None leaves it to the server.
        """
        self.place, self.client = place, client
        self.said_no_files = False
        """Whether the user knows that files are refused here: it is the same for all runs."""
        found: list[Any] = []
        while each := client.get_experiment_by_name(_name(len(found) + 1)):
            found.append(each)
        self.experiments = [str(each.experiment_id) for each in found]
        """All that ever took our runs, deleted ones too."""
        active = next((each for each in found if each.lifecycle_stage == "active"), None)
        if active is None:
            name = _name(len(found) + 1)
            self.experiment = str(client.create_experiment(name, artifacts, EXPERIMENT_TAGS))
            self.experiments.append(self.experiment)
            if found:
                say(
                    f"the experiment {EXPERIMENT} was deleted in MLflow, so runs go to {name}; to have the old one back: "
                    f"mlflow experiments restore --experiment-id {self.experiments[0]}"
                )
        else:
            self.experiment = str(active.experiment_id)
            if "mlflow.experimentKind" not in active.tags:  # one of an earlier version
                for tag, text in EXPERIMENT_TAGS.items():
                    client.set_experiment_tag(self.experiment, tag, text)

    def find(self, deleted: bool = False, **tags: str) -> Any | None:
        """The latest run with these tags, where `__` in a name stands for a dot; None where there is none.

        Args:
            deleted: look among the deleted runs instead.
        """
        from mlflow.entities import ViewType

        where = " and ".join(f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items())
        found = self.client.search_runs(
            self.experiments, where, ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY,
            max_results=1, order_by=["attributes.start_time DESC"],
        )  # fmt: skip
        return found[0] if found else None


def _name(number: int) -> str:
    """What the experiment is called, as the first or, where those before it were deleted, a later one."""
    return EXPERIMENT if number == 1 else f"{EXPERIMENT}-{number}"


def advice(error: BaseException) -> str:
    """What the user can do about a store that fails; empty where nobody knows."""
    text = f"{type(error).__name__} {error}"
    known = (
        (
            "database schema",
            "another MLflow made it: `mlflow db upgrade URI` if that was an older one, else install it",
        ),
        ("Can't locate revision", "a newer MLflow made it: install that one, or move the file away"),
        ("locked", "another program keeps it locked: end that, or wait"),
        ("readonly", "it may not be written: give write permission, or set MLFLOW_TRACKING_URI"),
        ("unable to open", "it cannot be opened: is there the folder, and the permission?"),
        ("file is not a database", "it is no SQLite database: move it away"),
        ("error code 401", "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say who asks"),
        ("error code 403", "the user it is asked as may not do that"),
    )
    return next((remedy for words, remedy in known if words in text), "")


def failure(error: BaseException) -> str:
    """An error and what to do about it, in brackets."""
    remedy = advice(error)
    return f"({brief(error)}{'; ' if remedy else ''}{remedy})"


def _require_answer(uri: str) -> None:
    """OSError unless an HTTP server answers, and with no error of its own; nothing for other stores.

    Costs no import of MLflow, so a server that is away costs a stage nothing but this one request, in a thread.
    """
    if not uri.lower().startswith(("http://", "https://")):
        return
    scheme, _, rest = uri.partition("://")
    try:
        timeout = float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
        urllib.request.urlopen(f"{scheme}://{rest.rpartition('@')[2]}", timeout=timeout).close()
    except urllib.error.HTTPError as error:  # an answer, whatever it thinks of us
        error.close()
        if error.code >= 500:
            raise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # which certificates to trust is MLflow's own business
            raise


def _require_writable(uri: str) -> None:
    """sqlite3.Error unless an SQLite file that is there can be written now; MLflow would try for minutes to open it."""
    path = unquote(re.sub(r"^(sqlite(\+\w+)?:///)(file:)?|\?.*$", "", uri))
    if not uri.lower().startswith(("sqlite:", "sqlite+")) or not Path(path).exists():
        return
    import sqlite3  # where it is needed: not every Python has it

    connection = sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_SECONDS)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
    finally:
        connection.close()


def _make_whole(database: Path, make: Callable[[Path], object]) -> None:
    """Make a database under another name first: killed between two tables, MLflow would refuse it for ever."""
    fresh = database.with_name(f".{database.name}.tmp")
    for leftover in (fresh, fresh.with_name(f"{fresh.name}-journal")):
        leftover.unlink(missing_ok=True)
    make(fresh)
    fresh.replace(database)


def prepare_mlflow() -> None:
    """Settings that MLflow reads when imported; the user's own win. Unset, one call to a dead server takes minutes."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # what fails, our one line says; it would log tracebacks
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print the credentials in the URI
