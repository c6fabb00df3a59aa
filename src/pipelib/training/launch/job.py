"""One rank's part of a training: its job, running it, and the files that rank 0 writes at the end.

Under torchrun, ranks read their job from `work/job.json` and not from params.yaml, which the user may be editing.
"""

import signal
import sys

from pipelib.processes import die_on_signals, die_with_parent, outlive_terminal

if __name__ == "__main__":
    die_on_signals()  # before the imports below, which take seconds: a signal then ends the process without a traceback

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelib.errors import UserError, user_message
from pipelib.files import read_json, sha256_json, write_json, write_text
from pipelib.model.decoder import Decoder
from pipelib.schema import parse
from pipelib.stage import Build
from pipelib.tracking.run import NullRun, Run, attach_run
from pipelib.training.build import build_trainer
from pipelib.training.hardware import peak_gpu_memory, peak_of
from pipelib.training.launch.distributed import World, is_lost_connection, join_world
from pipelib.training.loop import Trainer
from pipelib.training.params import TrainParams
from pipelib.training.schedule import Cadence
from pipelib.training.task import Task
from pipelib.training.training_log import MainLog, NullLog

JOB, RESULT, ERROR = "job.json", "result.json", "error.txt"


@dataclass(frozen=True, kw_only=True)
class Job(ABC):
    """A training as all its ranks see it."""

    train: TrainParams
    cadence: Cadence
    record: str
    """The file of the run's record; empty if there is none."""
    code: str
    """The hash of the code files and package versions."""
    resumed_with_other_code: bool
    """Whether the user chose to resume unfinished work of other code."""
    trunk_step: int = 0
    """The step of the trunk that a fresh training has taken over: see `trunk.py`."""

    stage: ClassVar[str]

    @property
    @abstractmethod
    def task(self) -> Task:
        """What is trained, and on what."""

    @abstractmethod
    def export(self, model: Decoder, log: MainLog, outs: Path) -> Mapping[str, object]:
        """Write the outs of the finished training, on rank 0, and return what is special to its result.

        Args:
            outs: has the layout of the workspace.
        """

    @staticmethod
    def of(build: Build, train: TrainParams, cadence: Cadence, trunk_step: int = 0) -> dict[str, Any]:
        """The fields that all jobs of a stage have."""
        return {
            "train": train,
            "cadence": cadence,
            "record": str(build.run.path or ""),
            "code": sha256_json(build.code),
            "resumed_with_other_code": build.resumed_with_other_code,
            "trunk_step": trunk_step,
        }

    def write(self, work: Path) -> None:
        """Write the job for the ranks to read."""
        write_json(work / JOB, {"module": type(self).__module__, "job": asdict(self)})

    @staticmethod
    def read(work: Path) -> "Job":
        """Read the job that the launcher wrote. Its module is imported by its name."""
        written, problems = read_json(work / JOB), list[str]()
        kind: type[Job] = importlib.import_module(written["module"]).JOB
        job = parse(kind, written["job"], "", problems)
        assert job is not None, problems
        return job


def run_job(job: Job, work: Path, world: World, run: Run) -> None:
    """Train. Then rank 0 exports the model and the curves to work/outs and writes work/result.json."""
    task, train = job.task, job.train
    flops = task.flops_per_token(train.sequence_length)
    log = (
        MainLog(work, run, train, flops, lambda: peak_of(world.device, train.precision).times(world.world_size))
        if world.is_main
        else None
    )
    trainer = build_trainer(task, train, job.cadence, work, world, log or NullLog())
    if log and job.trunk_step:
        log.replay(job.cadence.log_every)
    model = trainer.run()
    if log:
        more = job.export(model, log, work / "outs")
        write_json(work / RESULT, {"result": {**_result(log), **more}, "speed": _speed(trainer, log)})


def _result(log: MainLog) -> dict[str, object]:
    last = log.train.last()
    return {
        "val_loss": round(log.validation.last()["val_loss"], 6),
        "train_loss": round(last["loss"], 6),
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
    }


def _speed(trainer: Trainer, log: MainLog) -> dict[str, object]:
    throughput, world = log.throughput, trainer.world
    return {
        "device_hours": round(trainer.hours.total, 4),
        "tokens_per_second": round(throughput.rate(throughput.whole)),
        "mfu": round(throughput.mfu(throughput.whole), 4) if throughput.whole.steps else 0.0,
        "data_wait_ms": round(throughput.whole.wait_ms, 3),
        "peak_teraflops": round(throughput.peak.flops / 1e12, 3) if throughput.peak else 0.0,
        "peak_source": throughput.peak.source if throughput.peak else "no step was left to train",
        "world_size": world.world_size,
        "micro_batch_size": trainer.params.micro_batch_rows(world.world_size),
        "device": world.device.type,
        **({"gpu_memory_gb": round(memory / 1e9, 2)} if (memory := peak_gpu_memory()) else {}),
    }


def _run_of(job: Job, world: World) -> Run:
    """The launcher's run on rank 0. No other rank records anything."""
    return attach_run(job.stage, Path(job.record)) if world.is_main and job.record else NullRun()


def _rank_main(work: Path) -> None:
    """Run one rank under torchrun."""
    die_with_parent(signal.SIGKILL)
    outlive_terminal()
    try:
        with join_world() as world:
            # Rank 0 reads for all: another machine may still see the old file.
            job = world.broadcast(Job.read(work) if world.is_main and not (work / ERROR).exists() else None)
            if job is None:  # torchrun restarted the ranks after an error that a restart does not fix
                return
            with _run_of(job, world) as run:
                try:
                    run_job(job, work, world, run)
                except Exception as error:
                    message = user_message(error)
                    if message is None:
                        raise
                    write_text(
                        work / ERROR, message
                    )  # before leaving the process group, which may wait for other ranks
                    raise SystemExit(1) from None
    except UserError as error:
        write_text(work / ERROR, str(error))
        sys.exit(1)
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        # No ERROR file: if torchrun restarts the ranks, they may find each other again.
        print(f"rank {os.environ['RANK']} lost the connection to another rank ({str(error).strip()})", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
