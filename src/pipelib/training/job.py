"""One rank's part of a training: what to do, doing it, and what rank 0 leaves behind.

Under torchrun, ranks read their job from `work/job.json` and not from params.yaml, which the user may be editing.
"""

import signal
import sys

from pipelib.processes import die_of_signals, outlive_terminal, tie_to_parent

if __name__ == "__main__":
    die_of_signals()  # importing torch takes seconds

from dataclasses import asdict, dataclass
from pathlib import Path

from pipelib.errors import UserError, user_message
from pipelib.files import read_json, write_json, write_text
from pipelib.model.decoder import Decoder
from pipelib.model.huggingface import export_model, readme
from pipelib.model.params import InitialisedModelParams
from pipelib.schema import parse
from pipelib.tokens.shards import Manifest, read_manifest
from pipelib.tracking.run import NullRun, Run, attach_run
from pipelib.training.distributed import World, join_world
from pipelib.training.hardware import most_gpu_memory, peak_of
from pipelib.training.inputs import InitialWeights
from pipelib.training.loop import Cadence, Trainer
from pipelib.training.params import TrainParams
from pipelib.training.recorder import NullRecorder, Recorder
from pipelib.workspace.places import Places

JOB, RESULT, ERROR = "job.json", "result.json", "error.txt"


@dataclass(frozen=True)
class Job:
    """A training as all its ranks see it."""

    model: InitialisedModelParams
    train: TrainParams
    cadence: Cadence
    tokens: str
    """The folder of the shards."""
    benchmarks: str
    """The folder of the benchmarks."""
    record: str
    """The file of the run's record; empty where there is none."""
    code: str
    """The hash of the code files and package versions."""
    resumed_with_other_code: bool
    """The user chose to go on with unfinished work of other code."""
    initial: InitialWeights
    """What the model starts from."""

    def write(self, work: Path) -> None:
        """Leave the job for the ranks to read."""
        write_json(work / JOB, asdict(self))

    @classmethod
    def read(cls, work: Path) -> "Job":
        """The job that the launcher left."""
        problems: list[str] = []
        job = parse(cls, read_json(work / JOB), "", problems)
        assert job is not None, problems
        return job


def run_job(job: Job, work: Path, world: World, run: Run) -> None:
    """Train; rank 0 then exports the model and the curves into work/outs, and writes work/result.json."""
    tokens = Path(job.tokens)
    manifest = read_manifest(tokens)
    recorder: Recorder = NullRecorder()
    if world.is_main:
        flops = job.model.flops_per_token(manifest.tokenizer.size, job.train.sequence_length)
        recorder = Recorder(
            work, run, job.train, flops, lambda: peak_of(world.device, job.train.precision).times(world.world_size)
        )
    trainer = Trainer(
        job.model, job.train, job.cadence, tokens, manifest, work, world, recorder, job.initial, Path(job.benchmarks)
    )
    model = trainer.run()
    if world.is_main:
        export(job, manifest, model, recorder, work / "outs")
        write_json(
            work / RESULT,
            {"result": _result(job, manifest, recorder), "speed": _speed(recorder, world, trainer.device_hours)},
        )


def export(job: Job, manifest: Manifest, model: Decoder, recorder: Recorder, outs: Path) -> None:
    """Write models/, curves/, and the speed of each logged run of steps."""
    recipe = {
        "data fingerprint": manifest.fingerprint,
        "data source": manifest.source,
        "code and packages, sha256": job.code,
        **{f"model.{key}": value for key, value in job.model.decides().items()},
        **{f"train.{key}": value for key, value in asdict(job.train).items()},
    }
    if job.initial.sha256:
        recipe["initial weights, sha256"] = job.initial.sha256
    if job.resumed_with_other_code:
        recipe["resumed with other code"] = True
    places = Places(outs)
    export_model(model, manifest.tokenizer, places.model, readme(job.model, manifest.tokenizer.size, recipe))
    for curve in recorder.curves:
        write_text(places.curves / curve.path.name, curve.path.read_text(encoding="utf-8"))
    write_text(places.speed("train", "csv"), recorder.speed.path.read_text(encoding="utf-8"))


def _result(job: Job, manifest: Manifest, recorder: Recorder) -> dict[str, object]:
    last = recorder.train.last()
    return {
        "val_loss": round(recorder.validation.last()["loss"], 6),
        "train_loss": round(last["loss"], 6),
        "steps": int(last["step"]),
        "tokens": int(last["tokens"]),
        "parameters": job.model.parameters(manifest.tokenizer.size),
    }


def _speed(recorder: Recorder, world: World, device_hours: float) -> dict[str, object]:
    return {
        "device_hours": round(device_hours, 4),
        "tokens_per_second": round(recorder.tokens_per_second),
        "mfu": round(recorder.mfu, 4),
        "data_wait_ms": round(recorder.data_wait_ms, 3),
        "peak_teraflops": round(recorder.peak.flops / 1e12, 3) if recorder.peak else 0.0,
        "peak_source": recorder.peak.source if recorder.peak else "no step was left to train",
        "world_size": world.world_size,
        "micro_batch_size": recorder.micro_batch_size,
        "device": world.device.type,
        **({"gpu_memory_gb": round(memory / 1e9, 2)} if (memory := most_gpu_memory()) else {}),
    }


def _run_of(job: Job, world: World) -> Run:
    """The launcher's run for rank 0; no other rank records anything."""
    return attach_run("train", Path(job.record)) if world.is_main and job.record else NullRun()


def _rank_main(work: Path) -> None:
    """A rank under torchrun."""
    tie_to_parent(signal.SIGKILL)
    outlive_terminal()
    try:
        with join_world() as world:
            # The first rank reads for all: another machine may still see what lay there before.
            job = world.share(Job.read(work) if world.is_main and not (work / ERROR).exists() else None)
            if job is None:  # torchrun has started the ranks again, and trying again does not help
                return
            with _run_of(job, world) as run:
                try:
                    run_job(job, work, world, run)
                except Exception as error:
                    message = user_message(error)
                    if message is None:
                        raise
                    write_text(work / ERROR, message)  # before leaving the group, which may wait for the other ranks
                    raise SystemExit(1) from None
    except UserError as error:
        write_text(work / ERROR, str(error))
        sys.exit(1)


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
