"""Pretraining: predict every token of the training shards from the tokens before it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelib.errors import tell
from pipelib.files import sha256_json
from pipelib.model.decoder import Decoder
from pipelib.model.huggingface import export_model
from pipelib.model.params import InitialisedModelParams, ModelParams
from pipelib.stage import Build, WorkResult
from pipelib.tokens.loader import RowSource, training_rows
from pipelib.tokens.shards import Manifest, read_manifest, verify_shards
from pipelib.training.batches import check_shares, fit_tokens
from pipelib.training.initial_weights import initial_model
from pipelib.training.inputs import RANDOM_WEIGHTS, InitialWeights, require_weights
from pipelib.training.launch.distributed import World
from pipelib.training.launch.job import Job
from pipelib.training.launch.launch import launch
from pipelib.training.launch.machines import find_machines, require_gpu
from pipelib.training.memory import Footprint
from pipelib.training.objectives import NextToken, Objective
from pipelib.training.params import TrainParams
from pipelib.training.probes import HellaSwag, Probe, Samples, ShardValidation, Validation
from pipelib.training.schedule import Cadence
from pipelib.training.task import Task
from pipelib.training.training_log import MainLog
from pipelib.training.trunk import Trunk
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import Places, StatePlaces


@dataclass(frozen=True)
class Pretraining(Task):
    """A model that learns the next token of the shards in a folder."""

    model: ModelParams
    tokens: Path
    """The folder of shards that `manifest` describes."""
    manifest: Manifest
    initial: InitialWeights = RANDOM_WEIGHTS
    """The weights of a fresh run; a checkpoint replaces them."""
    benchmarks: Path = Path()
    """The folder with the items that `hellaswag_every` scores."""
    objective_of: type[Objective] = NextToken

    @property
    def tokenizer(self) -> Tokenizer:
        """See `Task.tokenizer`."""
        return self.manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """See `Task.fingerprint`."""
        return self.manifest.fingerprint

    def initial_model(self, params: TrainParams, *, draw: bool) -> Decoder:
        """See `Task.initial_model`."""
        return initial_model(self.model, self.tokenizer, params.seed, self.initial, draw=draw)

    @property
    def objective_name(self) -> str:
        """See `Task.objective_name`."""
        return self.objective_of.__qualname__

    def objective(self, model: Decoder) -> Objective:
        """See `Task.objective`."""
        return self.objective_of(model)

    def rows(self, params: TrainParams) -> RowSource:
        """See `Task.rows`."""
        return training_rows(self.tokens, self.manifest, params.sequence_length)

    def validation(self, params: TrainParams, world: World) -> Validation:
        """See `Task.validation`."""
        return ShardValidation(params, self.tokens, world)

    def probes(self, params: TrainParams, world: World) -> Sequence[Probe]:
        """See `Task.probes`."""
        return HellaSwag(params, self.benchmarks, self.tokenizer, world), Samples(params, self.tokenizer, world)


@dataclass(frozen=True)
class PretrainJob(Job):
    """A pretraining as all its ranks see it."""

    model: InitialisedModelParams
    tokens: str
    """The folder of the shards."""
    benchmarks: str
    """The folder of the benchmarks."""
    initial: InitialWeights
    """The weights that the model starts from."""

    stage = "train"

    @cached_property
    def task(self) -> Pretraining:
        """See `Job.task`."""
        tokens = Path(self.tokens)
        return Pretraining(self.model, tokens, read_manifest(tokens), self.initial, Path(self.benchmarks))

    def export(self, model: Decoder, log: MainLog, outs: Path) -> Mapping[str, object]:
        """See `Job.export`."""
        places, manifest = Places(outs), self.task.manifest
        export_model(model, manifest.tokenizer, places.model, self._recipe(manifest))
        log.export(places.curves, places.speed(self.stage, "csv"))
        return {"parameters": self.model.parameters(manifest.tokenizer.size)}

    def _recipe(self, manifest: Manifest) -> dict[str, object]:
        """Everything that decided the weights."""
        return {
            "data": {"fingerprint": manifest.fingerprint, "source": manifest.source},
            "code_sha256": self.code,
            "model": self.model.decides(),
            "train": self.train.decides(),
            **({"initial_weights_sha256": self.initial.sha256} if self.initial.sha256 else {}),
            **({"resumed_with_other_code": True} if self.resumed_with_other_code else {}),
        }


JOB = PretrainJob


def pretrain(
    build: Build,
    model: InitialisedModelParams,
    train: TrainParams,
    cadence: Cadence,
    tokens: Path,
    benchmarks: Path,
    initial: InitialWeights,
    inputs: Mapping[str, object],
) -> WorkResult:
    """Train on the shards in `tokens`, build `models/` and `curves/`, and return the stage's result and speed.

    Args:
        benchmarks: the folder of the items that `train.hellaswag_every` scores.
        inputs: everything that decides the result.

    Raises:
        UserError: the data and the parameters do not fit together, or the training failed.
    """
    manifest = read_manifest(tokens)
    if note := require_weights(model, manifest.tokenizer):
        tell(f"train: {note}", error=True)
    # Check everything that can be checked before the ranks start.
    machines = find_machines()
    require_gpu(train.precision)
    train = fit_tokens(train, manifest, tell)
    check_shares(train, machines.world_size)
    # An out-of-range token would silently corrupt training. Reading takes seconds for 20 GB, and once is enough.
    key = sha256_json([manifest.fingerprint, str(tokens.absolute())])[:16]
    verify_shards(tokens, manifest, StatePlaces.chosen().verified / f"{key}.json")
    trunk = Trunk(train, {**inputs, "code": build.code, "world_size": machines.world_size}, build.work)
    trunk_step = 0 if os.environ.get("PIPELIB_RESUME") == "fresh" else trunk.take_over()
    if trunk_step:
        build.run.log_params({"trunk_step": trunk_step})
    job = PretrainJob(
        **Job.of(build, train, cadence, trunk_step),
        model=model,
        tokens=str(tokens),
        benchmarks=str(benchmarks),
        initial=initial,
    )
    result = launch(build, job, machines, Footprint(model, manifest.tokenizer.size, train))
    if not build.resumed_with_other_code:
        trunk.keep()
    return result
