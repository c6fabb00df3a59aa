"""The training of a GPT-2, from its first step, or from its last checkpoint, to its last.

What a run is, besides its data and parameters, is in `states` below; nothing else survives a checkpoint. The batch of a
step follows from the step, so a loader has no state.
"""

import math
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelib.errors import UserError
from pipelib.evaluation.loss import Loss, summed_loss
from pipelib.evaluation.samples import write_samples
from pipelib.model.device import autocast
from pipelib.model.gpt import GPT
from pipelib.model.params import ModelParams
from pipelib.tokens.loader import Batch, BatchPlan, Loader, training_rows, validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, Manifest
from pipelib.training.checkpoint import Checkpoints, Counters, RandomState, Stateful
from pipelib.training.distributed import World
from pipelib.training.initial_weights import RANDOM_WEIGHTS, InitialWeights, initial_model
from pipelib.training.optim import learning_rate_at, make_optimizer
from pipelib.training.params import TrainParams
from pipelib.training.recorder import Recorder
from pipelib.training.stopping import StopRequest, on_first_signal
from pipelib.training.watch import Watch


@dataclass(frozen=True)
class Cadence:
    """Steps between lines and between checkpoints: what may change without changing any result."""

    log_every: int
    checkpoint_every: int


def train(
    model_params: ModelParams,
    params: TrainParams,
    cadence: Cadence,
    tokens: Path,
    manifest: Manifest,
    work: Path,
    world: World,
    recorder: Recorder,
    initial: InitialWeights = RANDOM_WEIGHTS,
) -> GPT:
    """Train on the shards in `tokens` and return the model after its last step, on this rank's device.

    Args:
        work: where checkpoints go, and are found again.
        initial: what the model starts from, where no checkpoint is found.

    Raises:
        UserError: a value is infinite or not a number; the run was stopped by a signal, after a checkpoint.
    """
    set_determinism(params, world)
    model = initial_model(model_params, params.seed, initial)
    model.activation_checkpointing = params.activation_checkpointing
    model.to(world.device)
    network = world.wrap(torch.compile(model) if params.compile else model)  # type: ignore[arg-type]
    world.settle(network, params.micro_batch_rows(world.world_size), params.sequence_length, params.precision)
    optimizer = make_optimizer(model, params)
    loader, plan = make_loader(params, tokens, manifest, world)

    state = Counters()
    states: dict[str, Stateful] = {"model": model, "optimizer": optimizer, "train": state, "rng": RandomState()}
    identity = {"model": asdict(model_params), "train": _plain(asdict(params)), "data": manifest.fingerprint}
    checkpoints = Checkpoints(work / "checkpoints", identity)
    checkpoints.load_latest(states)
    recorder.resume(state.step)
    announce(state, params, plan, world, checkpoints.loaded.get("world_size", world.world_size))
    watch = Watch(params, plan, checkpoints, world)
    stop = StopRequest(work if world.world_size > 1 else None)

    with on_first_signal(stop.note), checkpoints:
        if not state.step:
            with recorder.pause():
                recorder.validated(state, validation_loss(model, tokens, params, world))
        for step in range(state.step, params.max_steps):
            if step == plan.first_step(epoch=1):
                recorder.say(
                    f"step {step + 1:,}: epoch 2 of {plan.epochs(params.max_steps):.2f} begins, so rows repeat from here on; "
                    f"train.max_epochs = {params.max_epochs:g} allows it"
                )
            learning_rate = learning_rate_at(step, params)
            batches = loader.micro_batches(step)
            result = take_step(network, optimizer, batches, learning_rate, params, world, stop.signal())
            state.step, state.tokens = step + 1, state.tokens + params.global_batch_tokens
            assert state.tokens == state.step * params.global_batch_tokens
            recorder.step(state, result.loss, result.grad_norm, learning_rate, loader.wait)
            watch.note(state.step, learning_rate, result.rank_losses, result.grad_norm, result.stop)
            last = state.step == params.max_steps
            logging = due(state.step, cadence.log_every, last)
            validating = due(state.step, params.validate_every, last)
            sampling = due(state.step, params.sample_every, last)
            saving = due(state.step, cadence.checkpoint_every, last)
            waiting = logging or validating or sampling or saving  # for the device
            stopping = watch.look() if waiting or not world.runs_ahead else 0
            if logging:
                recorder.flush()
                checkpoints.check()
            val_loss = None
            if validating:
                with recorder.pause():
                    val_loss = validation_loss(model, tokens, params, world)
                    recorder.validated(state, val_loss)
            if sampling and world.is_main:
                with recorder.pause():
                    recorder.sampled(state, write_samples(model, params.sample_prompts, params.precision, params.seed))
            if saving or stopping:
                with recorder.pause():
                    if world.is_main:
                        meta = {"tokens": state.tokens, "world_size": world.world_size}
                        checkpoints.save(state.step, states, meta, val_loss.mean if val_loss else None, recorder.sync)
            if stopping and not last:
                checkpoints.wait()
                world.barrier()  # the first rank that ends has torchrun end the others
                raise UserError(
                    f"stopped by {signal.Signals(stopping).name} after step {state.step:,}, which is saved; dvc repro goes on "
                    "from there."
                )
    return model


class StepResult(NamedTuple):
    """What a step came to: on the device, so that nothing waits for it."""

    loss: Tensor
    """The mean of the global batch, a scalar."""
    grad_norm: Tensor
    """Of its gradient before clipping, a scalar."""
    rank_losses: Tensor
    """The mean of every rank's share, (world_size,)."""
    stop: Tensor
    """The signal that asks a rank to stop, a scalar; 0 where none is asked."""


def take_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    learning_rate: float,
    params: TrainParams,
    world: World,
    stop: int = 0,
) -> StepResult:
    """One optimizer step on this rank's micro-batches; none where a loss or the gradient norm is not finite.

    Args:
        stop: the signal that asks this rank to stop, for all ranks to know of.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    losses = []
    for micro_step, (inputs, targets) in enumerate(batches, start=1):
        with world.sync_when(micro_step == len(batches), network), autocast(world.device, params.precision):
            loss = network(_on(inputs, world.device), _on(targets, world.device)) / len(batches)
        loss.backward()
        losses.append(loss.detach())
    grad_norm = nn.utils.clip_grad_norm_(network.parameters(), params.grad_clip_norm)
    loss = torch.stack(losses).sum()
    rank_losses, stops = world.gather(torch.stack((loss, torch.full_like(loss, stop)))).unbind(1)
    # The fused AdamW leaves weights and state as they are where this is 1, as it does for a gradient scaler.
    optimizer.found_inf = 1 - (rank_losses.sum() + grad_norm).isfinite().float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(rank_losses.mean(), grad_norm, rank_losses, stops.max())


def _on(array: object, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def due(step: int, every: int, last: bool) -> bool:
    """Whether something that happens every so many steps, and at the last one, happens after `step`."""
    return last or step % every == 0


def make_loader(params: TrainParams, tokens: Path, manifest: Manifest, world: World) -> tuple[Loader, BatchPlan]:
    """This rank's loader, and the plan of the global batches that all ranks share."""
    rows = training_rows(tokens, manifest, params.sequence_length)
    plan = BatchPlan(manifest.fingerprint, params.seed, len(rows), params.rows_per_step)
    return Loader(rows, plan, params.micro_batch_rows(world.world_size), world.rank, world.world_size), plan


def check_plan(params: TrainParams, manifest: Manifest, world_size: int) -> None:
    """Refuse what cannot be trained, before anything starts.

    Raises:
        UserError: too few tokens for one batch or for `max_tokens`, or a batch that the ranks cannot share equally.
    """
    available = manifest.tokens("train")
    row_count = (available - 1) // params.sequence_length
    if row_count < params.rows_per_step:
        raise UserError(
            f"the training shards have {available:,} tokens, {row_count} rows of {params.sequence_length}, and one step needs "
            f"{params.rows_per_step}; lower train.global_batch_tokens or add text."
        )
    epochs = params.max_steps * params.rows_per_step / row_count
    if epochs > params.max_epochs:
        raise UserError(
            f"train.max_tokens = {params.max_tokens:,} is {epochs:.3f} passes over the {available:,} training tokens, so rows "
            f"would repeat; allow it with train.max_epochs: {math.ceil(epochs * 1000) / 1000:g}, lower max_tokens, or add text."
        )
    if params.rows_per_step < world_size or params.rows_per_step % (params.micro_batch_rows(world_size) * world_size):
        raise UserError(
            f"{world_size} ranks with train.micro_batch_size = {params.micro_batch_size} cannot share the "
            f"{params.rows_per_step} rows of a step equally, so some would wait or rows would be lost; lower "
            "train.micro_batch_size, or start fewer ranks with PIPELIB_NPROC."
        )


def announce(state: Counters, params: TrainParams, plan: BatchPlan, world: World, earlier_ranks: object) -> None:
    """Say what is about to happen, and what it is not where other ranks than `earlier_ranks` go on."""
    if world.is_main:
        if earlier_ranks != world.world_size:
            print(
                f"the training had {earlier_ranks} rank(s) and goes on with {world.world_size}: each step has the same batch, "
                "and its sums round otherwise, so from here on losses, gradient norms and weights equal those of an "
                "uninterrupted run nearly, and not bit for bit",
                flush=True,
            )
        begin = f"goes on after step {state.step:,}" if state.step else "starts"
        print(
            f"training {begin}: {params.max_steps:,} steps of {params.global_batch_tokens:,} tokens, "
            f"{plan.epochs(params.max_steps):.2f} epochs, {params.gradient_accumulation_steps(world.world_size)} micro-steps on "
            f"each of {world.world_size} rank(s), {world.device.type}, {params.precision}",
            flush=True,
        )


def validation_loss(model: GPT, tokens: Path, params: TrainParams, world: World) -> Loss:
    """The loss on the first `validate_tokens` tokens of the validation shard, shared among the ranks."""
    batches = validation_batches(
        tokens / VALIDATION_SHARD, params.sequence_length, params.micro_batch_size, params.validate_tokens
    )
    mine = (batch for number, batch in enumerate(batches) if number % world.world_size == world.rank)
    share = summed_loss(model, mine, params.precision)
    whole = world.sum(torch.tensor([share.nats, share.tokens], dtype=torch.float64, device=world.device)).tolist()
    return Loss(whole[0], int(whole[1]))


def set_determinism(params: TrainParams, world: World) -> None:
    """Fix what could make two runs differ: torch's own seed, and on a GPU the choice of kernels."""
    torch.manual_seed(params.seed)
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = params.precision == "bf16"
        torch.use_deterministic_algorithms(params.deterministic)
        torch.backends.cudnn.benchmark = False
        if params.compile and params.deterministic:
            import torch._inductor.config as inductor

            inductor.deterministic = True  # no choice of kernels by their time, which differs from run to run


def _plain(mapping: dict[str, object]) -> dict[str, object]:
    """The mapping as JSON would give it back: tuples as lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in mapping.items()}
