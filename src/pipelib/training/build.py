"""Build a training from its parameters: make every part, then restore the last checkpoint."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipelib.model.decoder import Decoder
from pipelib.model.device import require_support
from pipelib.model.params import ModelParams
from pipelib.tokens.shards import Manifest
from pipelib.training.batches import make_loader
from pipelib.training.checkpoint import CHECKPOINTS, Checkpoints, RandomState, Stateful
from pipelib.training.determinism import set_determinism
from pipelib.training.guards import Guards
from pipelib.training.hardware import reset_peak_gpu_memory
from pipelib.training.initial_weights import initial_model
from pipelib.training.inputs import RANDOM_WEIGHTS, InitialWeights
from pipelib.training.launch.distributed import World
from pipelib.training.launch.stopping import StopRequest
from pipelib.training.loop import Trainer
from pipelib.training.loss_scale import LossScale, loss_scale
from pipelib.training.memory import Footprint
from pipelib.training.micro_batch import resolve_micro_batch_size
from pipelib.training.objectives import NextToken, Objective
from pipelib.training.optimizer import make_optimizer
from pipelib.training.params import TrainParams
from pipelib.training.probes import HellaSwag, Samples, Validation
from pipelib.training.schedule import Cadence, Schedule
from pipelib.training.spikes import Spikes
from pipelib.training.state import DeviceHours, TrainState
from pipelib.training.training_log import TrainingLog
from pipelib.training.update_sizes import UpdateSizes


def build_trainer(
    model_params: ModelParams,
    params: TrainParams,
    cadence: Cadence,
    tokens: Path,
    manifest: Manifest,
    work: Path,
    world: World,
    log: TrainingLog,
    initial: InitialWeights = RANDOM_WEIGHTS,
    benchmarks: Path = Path(),
    objective_of: type[Objective] = NextToken,
) -> Trainer:
    """Make one rank's training on a folder of shards, at the step of its last checkpoint.

    Args:
        tokens: the folder of shards that `manifest` describes.
        work: the folder where checkpoints are written and found.
        initial: the weights of a fresh run; a checkpoint replaces them.
        benchmarks: the folder with the items that `hellaswag_every` scores.
        objective_of: makes the objective from the model.

    Raises:
        UserError: the weights, data or micro-batch do not fit the parameters.
    """
    state, spikes, hours = TrainState(), Spikes(params.spike), DeviceHours(world.world_size)
    tokenizer = manifest.tokenizer
    footprint = Footprint(model_params, tokenizer.size, params, world.world_size)
    require_support(world.device, params.precision)
    set_determinism(params, world)
    # Measured before anything is on the device, and the minimum over ranks, so that all choose the same micro-batch.
    free = world.min(footprint.free_per_rank(world.device, world.local_ranks))
    identity = {
        "model": model_params.decides(),
        "train": params.trunk(),
        "data": manifest.fingerprint,
        "objective": objective_of.__qualname__,
    }
    checkpoints = Checkpoints(work / CHECKPOINTS, identity, spikes.rollback_depth, params.cooldown_start)
    with footprint.explain_out_of_memory(free):
        model = initial_model(model_params, tokenizer, params.seed, initial, draw=world.is_main)
        set_arithmetic(model, params)
        model.to(world.device)
        optimizer = make_optimizer(model, params)
        states: dict[str, Stateful] = {
            "model": model, "optimizer": optimizer, "train": state, "spikes": spikes, "hours": hours, "rng": RandomState(),
        }  # fmt: skip
        scale = loss_scale(params.precision, world.device)
        if isinstance(scale, LossScale):
            states["loss_scale"] = scale
        checkpoints.load_latest(states, agree=world.from_rank_0)
        # Compile, then size the micro-batch, then wrap for several ranks: each needs the one before.
        objective = objective_of(model)
        trained = compiled(objective, params)
        params = resolve_micro_batch_size(footprint, trained, world, free, state.micro_batch_size)
        network = world.wrap(trained)
        reset_peak_gpu_memory()
    update_sizes = UpdateSizes(model, optimizer)
    loader, plan = make_loader(params, tokens, manifest, world)
    validation = Validation(params, tokens, world)
    probes = (validation, HellaSwag(params, benchmarks, tokenizer, world), Samples(params, tokenizer, world))
    return Trainer(
        params=params,
        schedule=Schedule.of(params, cadence),
        world=world,
        model=model,
        objective=objective,
        network=network,
        optimizer=optimizer,
        update_sizes=update_sizes,
        loss_scale=scale,
        loader=loader,
        plan=plan,
        state=state,
        spikes=spikes,
        hours=hours,
        states=states,
        previous_world_size=state.world_size,
        checkpoints=checkpoints,
        guards=Guards(params, update_sizes, plan, spikes, checkpoints, world),
        validation=validation,
        probes=probes,
        log=log,
        stop_request=StopRequest(work if world.world_size > 1 else None),
        explain_out_of_memory=partial(replace(footprint, train=params).explain_out_of_memory, free),
    )


def set_arithmetic(model: Decoder, params: TrainParams) -> None:
    """Set how the model computes, as the parameters say."""
    model.activation_checkpointing = params.activation_checkpointing
    model.bf16_residual, model.separate_qkv = params.tried.bf16_residual, params.tried.separate_qkv


def compiled(objective: Objective, params: TrainParams) -> nn.Module:
    """The objective as the parameters want it: compiled or not."""
    if not params.compile:
        return objective
    mode = "max-autotune-no-cudagraphs" if params.tried.max_autotune else None
    return torch.compile(objective, mode=mode)  # type: ignore[return-value]
