"""The frame of a stage: parameters checked, errors said plainly, progress in its state, outs published, run recorded."""

import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipelib.errors import as_typed, tell, user_message
from pipelib.files import write_json
from pipelib.processes import Stopped, leave_other_jobs, on_first_signal, outlive_terminal
from pipelib.schema import flatten
from pipelib.tracking.run import Run, is_mirroring, is_recorded, open_run
from pipelib.workspace.git import git_state
from pipelib.workspace.places import Places
from pipelib.workspace.provenance import code_hashes
from pipelib.workspace.workdir import WorkDir

STOP_SECONDS = 10.0
"""How long a stage that is asked to stop may take to record that and to end; `docker stop` waits as long."""


@dataclass(frozen=True)
class Build:
    """What a stage's work needs: where to build, and where to record."""

    outs: Path
    """Outs are made here, under their paths in the workspace; complete when the work returns."""
    work: Path
    """Anything else that a later run can go on from."""
    run: Run
    """The record of this run, mirrored to MLflow."""
    code: Mapping[str, str]
    """What makes the outs: see `provenance.code_hashes`."""
    resumed_with_other_code: bool
    """The user chose to go on with unfinished work of other code."""


Made = tuple[Mapping[str, object], Mapping[str, object]]
"""A stage's result and its speed, each as JSON."""
Work = Callable[[Build], Made]
"""Builds the outs. What takes long to import, it imports itself: it is not called where finished outs are linked."""


def run_stage(name: str, main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and exit with its status.

    The user's mistakes become one message and exit status 1, a full disk too; a defect of ours keeps its traceback. A signal
    that asks to stop ends the stage, after what `main` does about it.
    """
    leave_other_jobs()
    outlive_terminal()
    try:
        with on_first_signal(_stop):
            main()
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else signal.SIGINT
        tell(f"{name}: stopped by {signal.Signals(number).name}; run dvc repro to resume from here", error=True)
        _leave(128 + number)
    except SystemExit as error:
        _leave(error.code or 0)
    except Exception as error:
        message = user_message(error)
        if message is None:
            traceback.print_exc()
            _leave(1)
        _leave(f"{name}: {as_typed(message)}")
    _leave(0)


def _stop(number: int) -> None:
    """Leave the work where it is; whatever still waits for a thread or a worker after `STOP_SECONDS` is not waited for."""
    watch = threading.Timer(STOP_SECONDS, os._exit, (128 + number,))
    watch.daemon = True
    watch.start()
    raise Stopped(number)


def _leave(status: int | str) -> NoReturn:
    """`sys.exit`; at once where a thread is still busy with MLflow, which the interpreter would take seconds to clear away."""
    if is_mirroring():
        if isinstance(status, str):
            tell(status, error=True)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def build_outs(name: str, params: object, inputs: Mapping[str, object], work: Work) -> None:
    """Do a stage's work in its state, unless finished outs of the same inputs and code are there, and publish the outs.

    Args:
        name: the stage.
        params: all parameters, for the record.
        inputs: what decides the result: the stage's parameters and the fingerprints of its data.
        work: builds the outs.
    """
    flat = dict(flatten(params))
    code = code_hashes(name, flat)
    with WorkDir(name, inputs, code) as state:
        if state.finished:
            state.publish()
            tell(f"{name}: finished earlier with the same parameters, data and code; its outs are linked again")
            if is_recorded(name, flat, state.fingerprint, code):
                return  # nothing that its record, and MLflow, would not have
        with open_run(name, params, state.fingerprint, code, is_fresh=state.is_fresh) as run:
            if state.resumed_with_other_code:
                run.log_params({"resumed_with_other_code": True})
            if not state.finished:
                _make(name, state, run, work)
            run.log_outs(state.final)


def _make(name: str, state: WorkDir, run: Run, work: Work) -> None:
    """Build the outs, and publish them."""
    outs = state.work / "outs"
    places = Places(outs)
    shutil.rmtree(outs, ignore_errors=True)
    outs.mkdir()
    started = time.monotonic()
    result, speed = work(Build(outs, state.work, run, state.code, state.resumed_with_other_code))
    write_json(places.result(name), result)
    git = {f"git_{key}": value for key, value in git_state(Path.cwd()).items()}
    write_json(places.speed(name), {"seconds": round(time.monotonic() - started, 2), **speed, **git})
    state.finish()
    state.publish()
