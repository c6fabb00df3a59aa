"""Start a training on this machine: in this process, or as one rank a GPU under torchrun.

The number of ranks is no parameter, since results do not hang on it: it is the number of GPUs, or `PIPELIB_NPROC`,
which also gives several ranks on a CPU. Ranks read what to do from `work/job.json`, not from params.yaml, which the user
may be editing.
"""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelib.config import parse
from pipelib.errors import UserError
from pipelib.files import read_json, remove, write_json, write_text
from pipelib.model.huggingface import export_model, readme
from pipelib.params import Params
from pipelib.processes import tie_to_parent
from pipelib.stage import Build
from pipelib.tokens.shards import read_manifest
from pipelib.tracking import NullRun, Run, open_run
from pipelib.training.distributed import World, join_world
from pipelib.training.hardware import peak_of
from pipelib.training.loop import Cadence, check_plan, train
from pipelib.training.recorder import NullRecorder, Recorder

JOB, RESULT, ERROR = "job.json", "result.json", "error.txt"


def process_count() -> int:
    """Ranks to start: `$PIPELIB_NPROC`, else one a GPU, else one.

    Raises:
        UserError: `PIPELIB_NPROC` is no number, or asks for more ranks than there are GPUs.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wish = os.environ.get("PIPELIB_NPROC", "")
    if not wish:
        return max(1, gpus)
    if not (wish.isdecimal() and int(wish)):
        raise UserError(
            f"PIPELIB_NPROC={wish} is not a number of processes; give 1 or more, or unset it for one a GPU."
        )
    if gpus and int(wish) > gpus:
        raise UserError(
            f"PIPELIB_NPROC={wish} is more than the {gpus} GPU(s) here, and ranks cannot share one; lower it."
        )
    return int(wish)


def launch(build: Build, params: Params, tokens: Path) -> tuple[Any, Any]:
    """Train on the shards in `tokens` and build `models/` and `curves/`; the stage's result and speed.

    Raises:
        UserError: the data and parameters do not go together, or the training said what went wrong.
    """
    ranks = process_count()
    check_plan(params.train, read_manifest(tokens), ranks)
    job = {
        "params": asdict(params), "tokens": str(tokens), "fingerprint": build.fingerprint, "code": dict(build.code),
        "resumed_with_other_code": build.resumed_with_other_code,
    }  # fmt: skip
    for leftover in (RESULT, ERROR):
        remove(build.work / leftover)
    write_json(build.work / JOB, job)
    if ranks == 1:
        with join_world() as world:
            run_job(build.work, world, build.run)
    else:
        _run_ranks(build.work, ranks)
    result = read_json(build.work / RESULT)
    return result["result"], result["speed"]


def _run_ranks(work: Path, ranks: int) -> None:
    """Run the job of `work` under torchrun and wait for it; signals to this process reach the ranks."""
    command = [
        sys.executable, "-m", "pipelib.training.agent", "--standalone", f"--nproc-per-node={ranks}",
        "-m", "pipelib.training.launch", str(work),
    ]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # ranks set their own number; this only keeps torchrun quiet
    with subprocess.Popen(command, env=environment) as agent:
        before = signal.signal(signal.SIGTERM, lambda number, _: agent.send_signal(number))
        try:
            status = agent.wait()
        except KeyboardInterrupt:
            agent.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if status:
        said = work / ERROR
        raise UserError(
            said.read_text(encoding="utf-8")
            if said.exists()
            else f"a rank ended with status {status} before the training was done; what it printed is above. The last "
            "checkpoint is kept: dvc repro goes on from there."
        )


def run_job(work: Path, world: World, run: Run) -> None:
    """One rank's part of the job of `work`; rank 0 exports the model and leaves its result there."""
    job = read_json(work / JOB)
    params = _job_params(job["params"])
    tokens, manifest = Path(job["tokens"]), read_manifest(Path(job["tokens"]))
    recorder: Recorder = NullRecorder()
    peak = peak_of(world.device, params.train.precision)
    if world.is_main:
        flops = params.model.flops_per_token(params.train.sequence_length)
        recorder = Recorder(work, run, params.train, flops, peak, world.world_size)
    cadence = Cadence(params.logging.log_every, params.logging.checkpoint_every)
    model = train(params.model, params.train, cadence, tokens, manifest, work, world, recorder)
    if not world.is_main:
        return

    outs = work / "outs"
    recipe = {
        "data fingerprint": manifest.fingerprint,
        "data source": manifest.source,
        **{f"model.{key}": value for key, value in asdict(params.model).items()},
        **{f"train.{key}": value for key, value in asdict(params.train).items()},
    }
    if job["resumed_with_other_code"]:
        recipe["resumed with other code"] = True
    export_model(model, outs / "models", readme(params.model, recipe))
    for curve in (recorder.train, recorder.validation, recorder.samples):
        write_text(outs / "curves" / curve.path.name, curve.path.read_text(encoding="utf-8"))
    last = recorder.train.last()
    result = {
        "val_loss": round(recorder.validation.last()["loss"], 6),
        "train_loss": round(last["loss"], 6),
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
        "parameters": params.model.parameters,
    }
    speed = {
        "tokens_per_second": round(recorder.tokens_per_second),
        "mfu": round(recorder.mfu, 4),
        "peak_teraflops": round(peak.flops / 1e12, 3),
        "peak_source": peak.source,
        "world_size": world.world_size,
        "device": world.device.type,
    }
    write_json(work / RESULT, {"result": result, "speed": speed})


def _job_params(value: object) -> Params:
    """The parameters of a job file, which the launcher wrote from checked ones."""
    problems: list[str] = []
    params = parse(Params, value, "", problems)
    assert params is not None, problems
    return params


def _rank_main(work: Path) -> None:
    """A rank under torchrun."""
    tie_to_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the agent ends the ranks
    job = read_json(work / JOB)
    try:
        with join_world() as world:
            if world.is_main:
                params = _job_params(job["params"])
                with open_run("train", params, job["fingerprint"], job["code"], catch_up=False) as run:
                    run_job(work, world, run)
            else:
                run_job(work, world, NullRun())
    except UserError as error:
        write_text(work / ERROR, str(error))
        sys.exit(1)


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
