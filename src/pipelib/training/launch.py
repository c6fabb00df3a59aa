"""Start a training on this machine: in this process, or as one rank a GPU under torchrun.

The number of ranks is no parameter, since results do not hang on it: it is the number of GPUs, or `PIPELIB_NPROC`,
which also gives several ranks on a CPU.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pipelib.errors import UserError
from pipelib.files import read_json, remove, require_free_space, sha256_json
from pipelib.model.params import InitialisedModelParams
from pipelib.processes import positive_setting
from pipelib.stage import Build
from pipelib.tokens.shards import read_manifest, require_sound
from pipelib.training.checkpoint import CHECKPOINT_BYTES, KEPT
from pipelib.training.distributed import join_world
from pipelib.training.initial_weights import InitialWeights
from pipelib.training.job import ERROR, RESULT, Job, run_job
from pipelib.training.loop import Cadence, check_plan
from pipelib.training.params import TrainParams
from pipelib.training.stopping import STOP, ask_to_stop, on_first_signal


def process_count() -> int:
    """Ranks to start: `$PIPELIB_NPROC`, else one a GPU, else one.

    Raises:
        UserError: `PIPELIB_NPROC` is no number, or asks for more ranks than there are GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wish = positive_setting("PIPELIB_NPROC")
    if wish is not None and gpus and wish > gpus:
        raise UserError(
            f"PIPELIB_NPROC={wish} is more than the {gpus} GPU(s) here, and ranks cannot share one; lower it, or unset it."
        )
    return wish or max(1, gpus)


def launch(
    build: Build,
    model: InitialisedModelParams,
    train: TrainParams,
    cadence: Cadence,
    tokens: Path,
    initial: InitialWeights,
) -> tuple[Any, Any]:
    """Train on the shards in `tokens` and build `models/` and `curves/`; the stage's result and speed.

    Raises:
        UserError: the data and parameters do not go together, or the training said what went wrong.
    """
    ranks = process_count()
    manifest = read_manifest(tokens)
    check_plan(train, manifest, ranks)
    require_sound(tokens, manifest)  # 20 GB take seconds, and a token that is none spoils a model without a word
    require_free_space(build.work, CHECKPOINT_BYTES * (KEPT + 2) * model.parameters, "training, with its checkpoints,")
    job = Job(
        model,
        train,
        cadence,
        str(tokens),
        str(build.run.path or ""),
        sha256_json(build.code),
        build.resumed_with_other_code,
        initial,
    )
    for leftover in (RESULT, ERROR, STOP):
        remove(build.work / leftover)
    if ranks == 1:
        with join_world() as world:
            run_job(job, build.work, world, build.run)
    else:
        job.write(build.work)
        _run_ranks(build.work, ranks)
    result = read_json(build.work / RESULT)
    return result["result"], result["speed"]


def _run_ranks(work: Path, ranks: int) -> None:
    """Run the job of `work` under torchrun and wait for it; a wish to stop reaches the ranks."""
    command = [
        sys.executable, "-m", "pipelib.training.agent", "--standalone", f"--nproc-per-node={ranks}",
        "-m", "pipelib.training.job", str(work),
    ]  # fmt: skip
    environment = {
        "OMP_NUM_THREADS": "1",  # ranks set their own number; this only keeps torchrun quiet
        **os.environ,
        "PIPELIB_PARENT": str(os.getpid()),
    }
    # In a group of its own, since Ctrl-C in a terminal signals the whole group, and this process passes it on.
    with subprocess.Popen(command, env=environment, process_group=0) as agent:
        try:
            with on_first_signal(lambda number: ask_to_stop(work, number)):
                status = agent.wait()
        except KeyboardInterrupt:  # the second
            agent.kill()
            raise
    if status:
        raise UserError(_what_went_wrong(work / ERROR, status))


def _what_went_wrong(said: Path, status: int) -> str:
    """What a rank left to say, else what the status of torchrun tells."""
    if said.exists():
        return said.read_text(encoding="utf-8")
    if status == 128 + signal.SIGHUP:
        return "stopped by SIGHUP; the last checkpoint is kept, and dvc repro goes on from there."
    return (
        f"a rank ended with status {status} before the training was done; what it printed is above. The last checkpoint is "
        "kept: dvc repro goes on from there."
    )
