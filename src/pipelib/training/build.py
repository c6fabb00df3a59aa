"""Build a training from its parameters: make every part, then restore the last checkpoint."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipelib.model.decoder import Decoder
from pipelib.model.device import require_support
from pipelib.training.batches import load_rows
from pipelib.training.checkpoint import CHECKPOINTS, Checkpoints, RandomState, Stateful
from pipelib.training.determinism import set_determinism
from pipelib.training.guards import Guards
from pipelib.training.hardware import reset_peak_gpu_memory
from pipelib.training.launch.distributed import World
from pipelib.training.launch.stopping import StopRequest
from pipelib.training.loop import Trainer
from pipelib.training.loss_scale import LossScale, loss_scale
from pipelib.training.memory import Footprint
from pipelib.training.micro_batch import resolve_micro_batch_size
from pipelib.training.objectives import Objective
from pipelib.training.optimizer import make_optimizer
from pipelib.training.params import TrainParams
from pipelib.training.schedule import Cadence, Schedule
from pipelib.training.spikes import Spikes
from pipelib.training.state import DeviceHours, TrainState
from pipelib.training.task import Task
from pipelib.training.training_log import TrainingLog
from pipelib.training.update_sizes import UpdateSizes


def build_trainer(
    task: Task, params: TrainParams, cadence: Cadence, work: Path, world: World, log: TrainingLog
) -> Trainer:
    """Make one rank's training, at the step of its last checkpoint.

    Args:
        work: the folder where checkpoints are written and found.

    Raises:
        UserError: the weights, data or micro-batch do not fit the parameters.
    """
    state, spikes, hours = TrainState(), Spikes(params.spike), DeviceHours(world.world_size)
    footprint = Footprint(task.model, task.tokenizer.size, params, world.world_size, task.trained_parameters)
    require_support(world.device, params.precision)
    set_determinism(params, world)
    # Measured before anything is on the device, and the minimum over ranks, so that all choose the same micro-batch.
    free = world.min(footprint.free_per_rank(world.device, world.local_ranks))
    identity = {
        "model": task.model.decides(),
        "train": params.trunk(),
        "data": task.fingerprint,
        "objective": task.objective_name,
    }
    checkpoints = Checkpoints(work / CHECKPOINTS, identity, spikes.rollback_depth, params.cooldown_start)
    with footprint.explain_out_of_memory(free):
        model = task.initial_model(params, draw=world.is_main)
        set_arithmetic(model, params)
        model.to(world.device)
        optimizer = make_optimizer(model, params)
        states: dict[str, Stateful] = {
            "model": task.trained(model), "optimizer": optimizer, "train": state, "spikes": spikes, "hours": hours,
            "rng": RandomState(),
        }  # fmt: skip
        scale = loss_scale(params.precision, world.device)
        if isinstance(scale, LossScale):
            states["loss_scale"] = scale
        checkpoints.load_latest(states, agree=world.from_rank_0)
        # Compile, then size the micro-batch, then wrap for several ranks: each needs the one before.
        objective = task.objective(model)
        trained = compiled(objective, params)
        params = resolve_micro_batch_size(footprint, objective, trained, world, free, state.micro_batch_size)
        network = world.wrap(trained)
        reset_peak_gpu_memory()
    update_sizes = UpdateSizes(model, optimizer)
    loader, plan = load_rows(params, task.rows(params), task.fingerprint, world)
    validation = task.validation(params, world)
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
        probes=(validation, *task.probes(params, world)),
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
