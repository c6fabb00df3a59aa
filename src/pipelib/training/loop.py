"""The training of a model, from its first step, or from its last checkpoint, to its last.

What a run is, besides its data and parameters, is in `states` below; nothing else survives a checkpoint. The batch of a
step follows from the step and from the batches that were left out, so a loader has no state.
"""

import gc
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelib.errors import UserError, tell
from pipelib.evaluation.samples import write_samples
from pipelib.files import plural
from pipelib.model.decoder import Decoder
from pipelib.model.device import autocast
from pipelib.model.params import ModelParams
from pipelib.processes import on_first_signal
from pipelib.tokens.loader import BatchPlan
from pipelib.tokens.shards import Manifest
from pipelib.training.batches import TensorBatch, make_loader
from pipelib.training.checkpoint import CHECKPOINTS, Checkpoints, Counters, RandomState, Stateful
from pipelib.training.distributed import World
from pipelib.training.initial_weights import initial_model
from pipelib.training.inputs import RANDOM_WEIGHTS, InitialWeights
from pipelib.training.memory import memory_of_a_rank, out_of_memory_named
from pipelib.training.micro_batch import settle_micro_batch
from pipelib.training.optim import learning_rate_at, make_optimizer
from pipelib.training.params import TrainParams
from pipelib.training.recorder import Recorder
from pipelib.training.spikes import Spike, Spikes
from pipelib.training.stopping import StopRequest
from pipelib.training.validation import HellaSwag, validation_loss
from pipelib.training.watch import Watch


@dataclass(frozen=True)
class Cadence:
    """Steps between lines and between checkpoints: what may change without changing any result."""

    log_every: int
    checkpoint_every: int


class Trainer:
    """One rank's training on the shards of a folder."""

    def __init__(
        self,
        model_params: ModelParams,
        params: TrainParams,
        cadence: Cadence,
        tokens: Path,
        manifest: Manifest,
        work: Path,
        world: World,
        recorder: Recorder,
        initial: InitialWeights = RANDOM_WEIGHTS,
        benchmarks: Path = Path(),
    ) -> None:
        """Args:
            tokens: the folder of shards that `manifest` describes.
            work: where checkpoints go, and are found again.
            initial: what the model starts from, where no checkpoint is found.
            benchmarks: the folder with the items that `hellaswag_every` scores.

        Raises:
            UserError: no checkpoint, data or micro-batch fits the parameters.
        """
        self._began = time.monotonic()
        set_determinism(params, world)
        self._tokenizer, vocab_size = manifest.tokenizer, manifest.tokenizer.size
        free = world.least(memory_of_a_rank(model_params, vocab_size, world.device, world.local_ranks))
        self._state, self._spikes = Counters(), Spikes(params.spike)
        identity = {"model": model_params.decides(), "train": _plain(asdict(params)), "data": manifest.fingerprint}
        self._checkpoints = Checkpoints(work / CHECKPOINTS, identity, self._spikes.reach)
        with out_of_memory_named(model_params, vocab_size, params, world.world_size, free):
            self._model = initial_model(model_params, self._tokenizer, params.seed, initial)
            self._model.activation_checkpointing = params.activation_checkpointing
            self._model.to(world.device)
            self._optimizer = make_optimizer(self._model, params)
            self._states: dict[str, Stateful] = {
                "model": self._model, "optimizer": self._optimizer, "train": self._state, "spikes": self._spikes,
                "rng": RandomState(),
            }  # fmt: skip
            self._checkpoints.load_latest(self._states, agree=world.found_by_first)
            self._earlier_hours: float = self._checkpoints.loaded.get("device_hours", 0.0)
            network: nn.Module = torch.compile(self._model) if params.compile else self._model  # type: ignore[assignment]
            self._params = settle_micro_batch(
                model_params, vocab_size, params, network, world, free, self._checkpoints.loaded
            )
            self._network = world.wrap(network)
        self._loader, self._plan = make_loader(self._params, tokens, manifest, world)
        self._cadence, self._tokens, self._world, self._recorder = cadence, tokens, world, recorder
        self._watch = Watch(self._params, self._plan, self._spikes, self._checkpoints, world)
        self._stop = StopRequest(work if world.world_size > 1 else None)
        self._hellaswag = HellaSwag(benchmarks, self._tokenizer)
        self._memory = out_of_memory_named(model_params, vocab_size, self._params, world.world_size, free)

    @property
    def device_hours(self) -> float:
        """Hours of GPUs, or of processes on a CPU, that the training took: all of it, compiling and evaluating included, also
        before it was stopped, but without the steps that a kill undid."""
        return self._earlier_hours + (time.monotonic() - self._began) * self._world.world_size / 3600

    def run(self) -> Decoder:
        """Take the steps that are left, and return the model, on this rank's device.

        Raises:
            UserError: a value is infinite or not a number; memory ran out; the run was stopped by a signal, after a checkpoint.
        """
        params, cadence, state, recorder = self._params, self._cadence, self._state, self._recorder
        rows = params.micro_batch_rows(self._world.world_size)
        recorder.begin(state.step, rows, self._spikes)
        announce(state, params, self._plan, self._world, self._checkpoints.loaded.get("world_size"))
        with self._memory, on_first_signal(self._stop.note), garbage_kept_for_pauses(), self._checkpoints:
            self._world.settle(self._network, rows, params.sequence_length, params.precision)
            if not state.step:
                self._validate()
                if params.spike:
                    self._save(None)  # what a spike among the first steps goes back to
            while state.step < params.max_steps:
                self._take_step(state.step)
                last = state.step == params.max_steps
                logging = due(state.step, cadence.log_every, last)
                validating = due(state.step, params.validate_every, last)
                scoring = due(state.step, params.hellaswag_every, last)
                sampling = due(state.step, params.sample_every, last)
                saving = due(state.step, cadence.checkpoint_every, last)
                waiting = logging or validating or scoring or sampling or saving  # for the device
                stopping, spike = self._watch.look() if waiting or not self._world.runs_ahead else (0, None)
                if spike:
                    self._go_back(spike)
                    continue
                if logging:
                    recorder.flush()
                    self._checkpoints.check()
                val_loss = self._validate() if validating else None
                if scoring:
                    with recorder.pause():
                        recorder.scored(state, self._hellaswag.score(self._model, params, self._world))
                if sampling and self._world.is_main:
                    with recorder.pause():
                        texts = write_samples(
                            self._model, self._tokenizer, params.sample_prompts, params.precision, params.seed
                        )
                        recorder.sampled(state, texts)
                if saving or stopping:
                    self._save(val_loss)
                if stopping and not last:
                    self._checkpoints.wait()
                    self._world.barrier()  # the first rank that ends has torchrun end the others
                    raise UserError(
                        f"stopped by {signal.Signals(stopping).name} after step {state.step:,}, which is saved; run dvc "
                        "repro to resume from there."
                    )
        return self._model

    def _take_step(self, step: int) -> None:
        params, state = self._params, self._state
        batch = self._spikes.batch_of(step)
        if step and self._spikes.batch_of(step - 1) < self._plan.first_step(epoch=1) <= batch:
            self._recorder.say(
                f"step {step + 1:,}: epoch 2 of {self._plan.epochs(params.max_steps):.2f} begins, so rows repeat from here "
                f"on; train.max_epochs = {params.max_epochs:g} allows it"
            )
        rate = learning_rate_at(step, params)
        batches = self._loader.micro_batches(batch)
        tokens = self._world.world_size * sum(targets.numel() for _, targets in batches)
        assert tokens == params.global_batch_tokens, f"step {step + 1} has {tokens} tokens"
        result = take_step(self._network, self._optimizer, batches, rate, params, self._world, self._stop.signal())
        state.step, state.tokens = step + 1, state.tokens + tokens
        assert state.tokens == state.step * params.global_batch_tokens
        self._recorder.step(state, result.loss, result.grad_norm, rate, self._loader.wait)
        self._watch.note(state.step, rate, result.rank_losses, result.grad_norm, result.stop)

    def _validate(self) -> float:
        with self._recorder.pause():
            gc.collect()
            loss = validation_loss(self._model, self._tokens, self._params, self._world)
            self._recorder.validated(self._state, loss)
        return loss.mean

    def _save(self, val_loss: float | None) -> None:
        with self._recorder.pause():
            if self._world.is_main:
                meta = {
                    "tokens": self._state.tokens,
                    "world_size": self._world.world_size,
                    "micro_batch_size": self._params.micro_batch_size,
                    "device_hours": self.device_hours,
                }
                self._checkpoints.save(self._state.step, self._states, meta, val_loss, self._recorder.sync)

    def _go_back(self, spike: Spike) -> None:
        """Go on from a checkpoint before a spike, without the batches that led to it."""
        found = [*self._spikes.found, spike]
        self._checkpoints.wait()
        self._world.barrier()  # what the main rank was writing is there for all
        before = max(0, spike.step - self._spikes.reach)
        self._checkpoints.load_latest(self._states, before, self._world.found_by_first)
        if self._state.step >= spike.step:
            raise UserError(
                f"step {spike.step} has loss {spike.loss}, where train.spike allows {spike.limit:.4f}, and there is no sound "
                "checkpoint from before it to go back to, so the training stopped; start again with PIPELIB_RESUME=fresh."
            )
        self._spikes.found = found
        self._world.barrier()
        if self._world.is_main:
            self._checkpoints.drop_after(self._state.step)
        self._recorder.went_back(self._state.step, self._spikes)


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
    batches: Sequence[TensorBatch],
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
            loss = network(world.fetch(inputs), world.fetch(targets)) / len(batches)
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


@contextmanager
def garbage_kept_for_pauses() -> Iterator[None]:
    """Let no step wait for Python's search for cycles, which looks at every object that torch and the compiler made.

    What is there is left out of later searches; validations search what came since, on all ranks at once.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def due(step: int, every: int | None, last: bool) -> bool:
    """Whether what happens every so many steps, and at the last one, happens after `step`; what is None never does."""
    return every is not None and (last or step % every == 0)


def announce(state: Counters, params: TrainParams, plan: BatchPlan, world: World, earlier_ranks: object) -> None:
    """Say what is about to happen, and what it is not where other ranks than `earlier_ranks` go on."""
    if world.is_main:
        if earlier_ranks not in (None, world.world_size):
            tell(
                f"the training had {plural(int(str(earlier_ranks)), 'rank')} and goes on with {world.world_size}: each step "
                "has the same batch, and its sums round otherwise, so from here on losses, gradient norms and weights equal "
                "those of an uninterrupted run nearly, and not bit for bit"
            )
        if state.step and world.device.type == "cuda" and not params.deterministic:
            tell(
                "weights, moments, random streams and batches are exactly those of the checkpoint; the steps from here on round "
                "as the GPU's fastest kernels happen to, which train.deterministic: true would prevent"
            )
        begin = f"goes on after step {state.step:,}" if state.step else "starts"
        micro_steps = params.gradient_accumulation_steps(world.world_size)
        tell(
            f"training {begin}: {params.max_steps:,} steps of {params.global_batch_tokens:,} tokens, "
            f"{plan.epochs(params.max_steps):.2f} epochs, {plural(micro_steps, 'micro-step')} of "
            f"{plural(params.micro_batch_rows(world.world_size), 'row')} on each of {plural(world.world_size, 'rank')}, "
            f"{world.device.type}, {params.precision}"
        )


def set_determinism(params: TrainParams, world: World) -> None:
    """Fix what could make two runs differ: torch's own seed, and the choice of kernels."""
    torch.manual_seed(params.seed)
    on_gpu = world.device.type == "cuda"
    # On a CPU only what Inductor makes of the embedding's gradient is not: threads add to one sum in any order.
    torch.use_deterministic_algorithms(params.deterministic if on_gpu else params.compile)
    # It would fill memory that nothing here reads before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = params.precision == "bf16"
        torch.backends.cudnn.benchmark = False
        if params.compile and params.deterministic:
            import torch._inductor.config as inductor

            inductor.deterministic = True  # no choice of kernels by their time, which differs from run to run


def _plain(mapping: dict[str, object]) -> dict[str, object]:
    """The mapping as JSON would give it back: tuples as lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in mapping.items()}
