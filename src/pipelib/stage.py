"""What every stage does around its work: report errors, keep progress, publish outs, record the run."""

import argparse
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

from pipelib.errors import tell, user_message, with_venv_paths
from pipelib.files import write_json
from pipelib.processes import Stopped, clear_rank_variables, on_first_signal, outlive_terminal
from pipelib.schema import flatten
from pipelib.tracking.run import Run, is_mirroring, is_recorded, open_run
from pipelib.workspace.git import git_state
from pipelib.workspace.places import Places
from pipelib.workspace.provenance import code_hashes
from pipelib.workspace.workdir import WorkDir

STOP_SECONDS = 10.0
"""Time limit for a stage to record that it was stopped, and to end. `docker stop` waits the same time."""


@dataclass(frozen=True)
class Build:
    """What a stage's work gets: where to build, and where to record."""

    outs: Path
    """The folder for the outs, under their paths in the workspace. They are complete when the work returns."""
    work: Path
    """The folder for anything else from which a later run can resume."""
    run: Run
    """The record of this run, mirrored to MLflow."""
    code: Mapping[str, str]
    """The code that makes the outs: see `provenance.code_hashes`."""
    resumed_with_other_code: bool
    """Whether the user chose to resume unfinished work of other code."""


WorkResult = tuple[Mapping[str, object], Mapping[str, object]]
"""A stage's result and its speed, each written as JSON."""
Work = Callable[[Build], WorkResult]
"""Builds the outs. It imports slow modules itself, because it is not called if finished outs are linked."""


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser for the command line of a stage, `python -m stages.NAME`; without options it refuses every argument.

    Args:
        text: the docstring of the stage, whose first line says what it does.
    """
    return argparse.ArgumentParser(f"python -m stages.{name}", description=(text or "").partition("\n")[0])


def run_stage(name: str, main: Callable[[], None]) -> NoReturn:
    """Run a stage's `main` and exit with its status.

    An error that the user can fix becomes one message and exit status 1. A bug of ours keeps its traceback. A stop signal
    ends the stage, after `main` has handled it.
    """
    clear_rank_variables()
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
        _leave(f"{name}: {with_venv_paths(message)}")
    _leave(0)


def _stop(number: int) -> None:
    """Interrupt the work. After `STOP_SECONDS`, exit even if a thread or a worker has not ended."""
    # `os._exit` ends the process whatever its threads do; 128 + number is the shell's status for a signal.
    watch = threading.Timer(STOP_SECONDS, os._exit, (128 + number,))
    watch.daemon = True
    watch.start()
    raise Stopped(number)


def _leave(status: int | str) -> NoReturn:
    """Exit. If the MLflow thread is still busy, skip the interpreter's shutdown, which would wait for it for seconds."""
    if is_mirroring():
        if isinstance(status, str):
            tell(status, error=True)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def build_outs(name: str, params: object, inputs: Mapping[str, object], work: Work) -> None:
    """Do a stage's work in its state folder, unless outs of the same inputs and code are finished; then publish the outs.

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
            # DVC has deleted the outs, but the state still has them.
            state.publish()
            tell(f"{name}: finished earlier with the same parameters, data and code; its outs are linked again")
            if is_recorded(name, flat, state.fingerprint, code):
                return  # the record and MLflow already have this run
        with open_run(name, params, state.fingerprint, code, is_fresh=state.is_fresh) as run:
            if state.resumed_with_other_code:
                run.log_params({"resumed_with_other_code": True})
            if not state.finished:
                _make(name, state, run, work)
            run.log_outs(state.final)


def _make(name: str, state: WorkDir, run: Run, work: Work) -> None:
    """Build the outs and publish them."""
    outs = state.work / "outs"
    places = Places(outs)
    shutil.rmtree(outs, ignore_errors=True)  # outs of an interrupted run may be incomplete
    outs.mkdir()
    started = time.monotonic()
    result, speed = work(Build(outs, state.work, run, state.code, state.resumed_with_other_code))
    write_json(places.result(name), result)
    # The commit is not part of the result, because other commits may have the same code for this stage.
    git = {f"git_{key}": value for key, value in git_state(Path.cwd()).items()}
    write_json(places.speed(name), {"seconds": round(time.monotonic() - started, 2), **speed, **git})
    # Finish before publishing: a kill between the two loses no work, because the next run only publishes.
    state.finish()
    state.publish()
