"""`pipelib track`: list the runs' records and how much of them MLflow has, and send the rest."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelib.cli.command import Command, option, positional
from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.workspace.places import StatePlaces

if TYPE_CHECKING:
    from pipelib.inspection.records import RecordFile

EXAMPLES = """examples:
  pipelib track                       every run's record, and how much of it is in MLflow
  pipelib track --replay              send what is missing; nothing is sent twice
  pipelib track --replay brave-lynx   send one run, even if it was deleted in MLflow
"""


@dataclass(frozen=True)
class Track(Command):
    """List the records, or send them."""

    command = "track"
    help = "list the runs' records and how much of them MLflow has; --replay sends the rest"
    description = (
        "Every stage writes a record of its run to disk, with or without MLflow. List the records and how much of each is in "
        "MLflow (mlflow.db here, or MLFLOW_TRACKING_URI); with --replay, send what is missing."
    )
    examples = EXAMPLES

    runs: tuple[str, ...] = positional(
        "only these runs, by their names in `pipelib track`; default: all", default=(), nargs="*", metavar="RUN"
    )
    replay: bool = option("send what MLflow does not have", default=False)

    def run(self) -> int:
        """List, or send.

        Raises:
            UserError: a run has no record, or MLflow fails.
        """
        from pipelib.inspection.records import find_records, find_sent_state, replay
        from pipelib.tracking.mlflow_store import TrackingUri, failure
        from pipelib.tracking.record import redact
        from pipelib.tracking.replay import ALL, BUSY, DELETED

        root = StatePlaces.chosen().records.absolute()
        records = find_records(root, self.runs)
        if not records:
            print(f"no run has been recorded in {root}")
            return 0
        tracking_uri = TrackingUri.chosen()
        where = redact(tracking_uri.uri)
        try:
            if not self.replay and tracking_uri.database and not tracking_uri.database.exists():
                _print(records, ["nothing"] * len(records))
                tell(f"{where} does not exist yet; `pipelib track --replay` creates it")
                return 0
            tell(f"asking MLflow at {where}", error=True)  # its import alone takes seconds
            store = tracking_uri.open()
            if self.replay:
                replay(store, records, named=bool(self.runs))
                return 0
            states = [find_sent_state(store, record) for record in records]
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"MLflow at {where} failed {redact(failure(error))}, so nothing more was sent; the records in {root} are "
                "complete: run pipelib track --replay when it works again."
            ) from None
        _print(records, states)
        missing = sum(state not in (ALL, DELETED, BUSY) for state in states)
        tell(
            f"MLflow at {where} has not all of {missing} of {plural(len(records), 'record')}; `pipelib track --replay` "
            "sends the rest"
            if missing
            else f"MLflow at {where} has everything that was not deleted there"
        )
        return 0


def _print(records: Sequence["RecordFile"], states: Sequence[str]) -> None:
    """Print one row per record."""
    from pipelib.cli.table import print_table

    rows = [("run", "stage", "started", "ended", "points", "in MLflow")]
    for record, state in zip(records, states, strict=True):
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.begun))
        rows.append((record.key, record.stage, begun, record.ended or "-", f"{record.points:,}", state))
    print_table(rows)
