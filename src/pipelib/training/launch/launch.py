"""Start a training: in this process, or as one rank a GPU under torchrun, on this machine or on several."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from pipelib.errors import UserError, tell
from pipelib.files import files_under, read_json, remove, require_free_space, sha256_json
from pipelib.model.params import InitialisedModelParams
from pipelib.processes import on_first_signal
from pipelib.stage import Build
from pipelib.tokens.shards import read_manifest, verify_shards
from pipelib.training.batches import check_plan
from pipelib.training.checkpoint import CHECKPOINTS, checkpoint_bytes
from pipelib.training.inputs import InitialWeights, require_weights
from pipelib.training.launch.distributed import join_world
from pipelib.training.launch.job import ERROR, RESULT, Job, run_job
from pipelib.training.launch.machines import Machines, find_machines, wait_for_file
from pipelib.training.launch.stopping import STOP, ask_to_stop
from pipelib.training.launch.torchrun import start_torchrun
from pipelib.training.memory import Footprint
from pipelib.training.params import TrainParams
from pipelib.training.schedule import Cadence
from pipelib.workspace.workdir import WorkDir


def launch(
    build: Build,
    model: InitialisedModelParams,
    train: TrainParams,
    cadence: Cadence,
    tokens: Path,
    benchmarks: Path,
    initial: InitialWeights,
) -> tuple[Any, Any]:
    """Train on the shards in `tokens` and build `models/` and `curves/`; the stage's result and speed.

    Args:
        benchmarks: the folder of the items that `train.hellaswag_every` scores.

    Raises:
        UserError: the data and parameters do not go together, or the training said what went wrong.
    """
    manifest = read_manifest(tokens)
    if note := require_weights(model, manifest.tokenizer):
        tell(f"train: {note}", error=True)
    machines = find_machines()
    check_plan(train, manifest, machines.world_size)
    verify_shards(tokens, manifest)  # 20 GB take seconds, and a token that is none spoils a model without a word
    needed = checkpoint_bytes(Footprint(model, manifest.tokenizer.size, train), cadence.checkpoint_every)
    have = sum(path.stat().st_size for path in files_under(build.work / CHECKPOINTS))  # of a training that resumes
    require_free_space(build.work, needed - have, "training, with its checkpoints,")
    job = Job(
        model,
        train,
        cadence,
        str(tokens),
        str(benchmarks),
        str(build.run.path or ""),
        sha256_json(build.code),
        build.resumed_with_other_code,
        initial,
    )
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
    """Run this machine's ranks of a training, once the first machine has started it, and wait for its end.

    Args:
        find_state: the training's state, which is known when its data are there; the first machine holds its lock.

    Raises:
        UserError: this machine is none of several, sees another state or code than the first one, or the training failed.
    """
    machines = find_machines()
    if machines.count == 1:
        raise UserError(
            "--join is for a training on several machines, and PIPELIB_NNODES does not say that there are; set it, and "
            "PIPELIB_RDZV_ENDPOINT, as on the first machine."
        )
    machines.wait_for_first()
    state = find_state()
    state.require_same_code()
    _run_ranks(state.work, machines, first=False)
    tell("train: the first machine goes on from here")


def _run_ranks(work: Path, machines: Machines, *, first: bool) -> None:
    """Run the job of `work` under torchrun and wait for it; a request to stop reaches the ranks."""
    if machines.restarts:  # else ranks that start again find the addresses of those that died (torch 2.13)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    about_ranks = machines.arguments(work.parent.name, first=first)
    asked: list[int] = []

    def stop(number: int) -> None:
        asked.append(number)
        ask_to_stop(work, number)

    with on_first_signal(stop):
        status = _wait(start_torchrun([*about_ranks, "-m", "pipelib.training.launch.job", str(work)]))
    if status or (work / ERROR).exists():  # ranks that were started again leave it at what was said before
        raise UserError(_what_went_wrong(work / ERROR, status, asked))
    if first and machines.count > 1:
        wait_for_file(work / RESULT)


def _wait(status: Future[int]) -> int:
    """The result. Never one long wait: a signal that comes in the instant before it would be seen after it."""
    while not status.done():
        wait([status], timeout=1.0)
    return status.result()


def _what_went_wrong(said: Path, status: int, asked: Sequence[int]) -> str:
    """What a rank left to say, else what its status tells, unless it died of a signal that asked all of them to stop."""
    if said.exists():
        return said.read_text(encoding="utf-8")
    if asked:
        return (
            f"stopped by {signal.Signals(asked[0]).name} before the ranks could save a step; run dvc repro to resume from the "
            "last checkpoint."
        )
    return (
        f"a rank ended with status {status} before the training was done; what it printed is above. The last checkpoint is "
        "kept; run dvc repro to resume from there."
    )
