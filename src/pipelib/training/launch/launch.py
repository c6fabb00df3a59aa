"""Start a training: in this process, or under torchrun with one rank per GPU, on one machine or several."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from pipelib.errors import UserError, tell
from pipelib.files import files_under, read_json, remove, require_free_space
from pipelib.processes import on_first_signal
from pipelib.stage import Build
from pipelib.training.checkpoint import CHECKPOINTS, checkpoint_bytes
from pipelib.training.launch.distributed import join_world
from pipelib.training.launch.job import ERROR, RESULT, Job, run_job
from pipelib.training.launch.machines import Machines, find_machines, wait_for_file
from pipelib.training.launch.stopping import STOP, ask_to_stop
from pipelib.training.launch.torchrun import start_torchrun
from pipelib.training.memory import Footprint
from pipelib.workspace.workdir import WorkDir


def launch(build: Build, job: Job, machines: Machines, footprint: Footprint) -> tuple[Any, Any]:
    """Run a job's ranks, which build its outs, and return the stage's result and speed.

    Args:
        footprint: of the training.

    Raises:
        UserError: the disk is too small, or the training failed.
    """
    needed = checkpoint_bytes(footprint, job.cadence.checkpoint_every)
    have = sum(path.stat().st_size for path in files_under(build.work / CHECKPOINTS))  # if the training resumes
    require_free_space(build.work, needed - have, "training, with its checkpoints,")
    # An earlier attempt may have left these; the ranks would take them for their own.
    for leftover in (RESULT, ERROR, STOP):
        remove(build.work / leftover)
    if machines.world_size == 1 and not machines.restarts:
        with join_world() as world:
            run_job(job, build.work, world, build.run)
    else:
        job.write(build.work)
        _run_ranks(build.work, machines, first=True)
    result = read_json(build.work / RESULT)
    return result["result"], result["speed"]


def join(find_state: Callable[[], WorkDir]) -> None:
    """Wait until the first machine has started a training, run this machine's ranks of it, and wait for the end.

    Args:
        find_state: returns the training's state, which is known only once its data exist. The first machine holds its lock.

    Raises:
        UserError: this is not a training on several machines, this machine sees another state or other code than the first
            one, or the training failed.
    """
    machines = find_machines()
    if machines.count == 1:
        raise UserError(
            "--join is for a training on several machines, but PIPELIB_NNODES is not 2 or more; set it and "
            "PIPELIB_RDZV_ENDPOINT as on the first machine."
        )
    machines.wait_for_first()
    state = find_state()
    state.require_same_code()
    _run_ranks(state.work, machines, first=False)
    tell("train: this machine is done; the first machine finishes the stage")


def _run_ranks(work: Path, machines: Machines, *, first: bool) -> None:
    """Run the job of `work` under torchrun and wait for it, passing a signal on to the ranks."""
    if machines.restarts:  # else restarted ranks find the addresses of the ranks that died (torch 2.13)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    about_ranks = machines.arguments(work.parent.name, first=first)
    asked: list[int] = []

    def stop(number: int) -> None:
        asked.append(number)
        ask_to_stop(work, number)

    with on_first_signal(stop):
        status = _wait(start_torchrun([*about_ranks, "-m", "pipelib.training.launch.job", str(work)]), asked)
    if status or (work / ERROR).exists():  # restarted ranks exit with 0 if the file is there, see `_rank_main`
        raise UserError(_failure(work / ERROR, status, asked))
    if first and machines.count > 1 and not wait_for_file(work / RESULT):
        raise UserError(
            "the machine of rank 0 was lost after the last step, before it had written the model; run dvc repro to resume from "
            "the last checkpoint."
        )


def _wait(status: Future[int], asked: Sequence[int]) -> int:
    """Wait for torchrun's exit status, in short waits: a signal that arrives just before a wait is handled only after it.

    Return at once if a signal has asked to stop and there is no rank to do so: torchrun waits ten minutes for other machines.
    """
    while not status.done():
        wait([status], timeout=1.0)
        if asked and not status.done() and not _has_children():
            return 1
    return status.result()


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _failure(error_file: Path, status: int, asked: Sequence[int]) -> str:
    """The message of a failed training: the rank's own if it wrote one, else that of the signal, else the exit status."""
    if error_file.exists():
        return error_file.read_text(encoding="utf-8")
    if asked:
        return (
            f"stopped by {signal.Signals(asked[0]).name} before the ranks could save a step; run dvc repro to resume from the "
            "last checkpoint."
        )
    return (
        f"a rank ended with status {status} before the training was done; its output is above. The last checkpoint is kept; "
        "run dvc repro to resume from it."
    )
