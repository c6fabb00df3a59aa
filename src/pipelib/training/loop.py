"""The training page: from the first step, or from the last checkpoint, to the last step.

What survives a kill is in `states`, and nothing else does. The batch of a step follows from the step and from the batches
that were left out, so a loader has no state. `build.py` makes the parts.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import nn

from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.model.decoder import Decoder
from pipelib.processes import on_first_signal
from pipelib.tokens.loader import BatchPlan, Loader
from pipelib.training.batches import TensorBatch
from pipelib.training.checkpoint import Checkpoints, Stateful
from pipelib.training.determinism import gc_at_pauses_only
from pipelib.training.guards import GoBack, Guards, Stop
from pipelib.training.launch.distributed import World
from pipelib.training.launch.stopping import StopRequest
from pipelib.training.learning_rate import learning_rate_at
from pipelib.training.objectives import Objective
from pipelib.training.optimizer import Optimizer
from pipelib.training.params import TrainParams
from pipelib.training.probes import Probe, Validation
from pipelib.training.schedule import LOG, SAVE, Schedule
from pipelib.training.spikes import Spike, Spikes
from pipelib.training.state import DeviceHours, TrainState
from pipelib.training.step import take_step
from pipelib.training.training_log import TrainingLog


@dataclass
class Trainer:
    """One rank's training: its parts, and what it does with them."""

    params: TrainParams
    """With a number for `micro_batch_size: auto`."""
    schedule: Schedule
    world: World

    model: Decoder
    objective: Objective
    """The model, and what it is trained for."""
    network: nn.Module
    """The objective as this rank runs it: compiled, and wrapped where there are several ranks."""
    optimizer: Optimizer
    loader: Loader[TensorBatch]
    plan: BatchPlan

    state: TrainState
    spikes: Spikes
    hours: DeviceHours
    states: Mapping[str, Stateful]
    """All that survives a kill."""
    earlier_ranks: int
    """That took the steps so far; 0 where there are none."""

    checkpoints: Checkpoints
    guards: Guards
    validation: Validation
    probes: Sequence[Probe]
    """The validation, and what else is measured."""
    log: TrainingLog
    stop: StopRequest
    explain_out_of_memory: Callable[[], AbstractContextManager[None]]

    def run(self) -> Decoder:
        """Take the steps that are left, and return the model, on this rank's device.

        Raises:
            UserError: a value is infinite or not a number; memory ran out; the run was stopped by a signal, after a checkpoint.
        """
        with self._running():
            while self.state.step < self.params.max_steps:
                self._take_step()
                due = self.schedule.due(self.state.step)
                verdict = self.guards.check(wait=bool(due))
                if isinstance(verdict, GoBack):
                    self._go_back(verdict.spike)
                    continue
                if LOG in due:
                    self.log.flush()
                    self.checkpoints.check()
                for probe in self.probes:
                    if probe.due in due:
                        probe.run(self.model, self.state, self.log)
                if SAVE in due or isinstance(verdict, Stop):
                    self._save()
                if isinstance(verdict, Stop) and self.state.step < self.params.max_steps:
                    self._end(verdict)
        return self.model

    @contextmanager
    def _running(self) -> Iterator[None]:
        self.log.begin(self.state.step, self.spikes)
        self._announce()
        with self.explain_out_of_memory(), on_first_signal(self.stop.note), gc_at_pauses_only(), self.checkpoints:
            rows = self.params.micro_batch_rows(self.world.world_size)
            self.world.warm_up(self.network, rows, self.params.sequence_length, self.params.precision)
            if not self.state.step:
                self.validation.run(self.model, self.state, self.log)
                if self.params.spike:
                    self._save()  # what a spike among the first steps goes back to
            yield

    def _take_step(self) -> None:
        params, state, step = self.params, self.state, self.state.step
        batch = self.spikes.batch_of(step)
        if step and self.spikes.batch_of(step - 1) < self.plan.first_step(epoch=1) <= batch:
            self.log.say(
                f"step {step + 1:,}: epoch 2 of {self.plan.epochs(params.max_steps):.2f} begins, so rows repeat from here "
                f"on; train.max_epochs = {params.max_epochs:g} allows it"
            )
        rate = learning_rate_at(step, params)
        batches = self.loader.micro_batches(batch)
        tokens = self.world.world_size * sum(targets.numel() for _, targets in batches)
        assert tokens == params.global_batch_tokens, f"step {step + 1} has {tokens} tokens"
        result = take_step(
            self.network, self.objective, self.optimizer, batches, rate, params, self.world, self.stop.signal()
        )
        state.step, state.tokens = step + 1, state.tokens + tokens
        assert state.tokens == state.step * params.global_batch_tokens
        self.log.step(state, result, rate, self.loader.wait)
        self.guards.note(state.step, rate, result)

    def _save(self) -> None:
        with self.log.pause():
            if self.world.is_main:
                self.state.world_size = self.world.world_size
                self.state.micro_batch_size = self.params.micro_batch_rows(self.world.world_size)
                val_loss = self.validation.loss_at(self.state.step)
                self.checkpoints.save(
                    self.state.step, self.states, {"tokens": self.state.tokens}, val_loss, self.log.sync
                )

    def _go_back(self, spike: Spike) -> None:
        """Resume from a checkpoint before a spike, without the batches that led to it."""
        found = [*self.spikes.found, spike]
        self.checkpoints.wait()
        self.world.barrier()  # what the main rank was writing is there for all
        before = max(0, spike.step - self.spikes.rollback_depth)
        self.checkpoints.load_latest(self.states, before, self.world.from_rank_0)
        if self.state.step >= spike.step:
            raise UserError(
                f"step {spike.step} has loss {spike.loss}, where train.spike allows {spike.limit:.4f}, and there is no sound "
                "checkpoint from before it to go back to, so the training stopped; start again with PIPELIB_RESUME=fresh."
            )
        self.spikes.found = found
        self.world.barrier()
        if self.world.is_main:
            self.checkpoints.drop_after(self.state.step)
        self.log.went_back(self.state.step, self.spikes)

    def _end(self, stop: Stop) -> None:
        self.checkpoints.wait()
        self.world.barrier()  # the first rank that ends has torchrun end the others
        raise UserError(
            f"stopped by {signal.Signals(stop.signal).name} after step {self.state.step:,}, which is saved; run dvc repro to "
            "resume from there."
        )

    def _announce(self) -> None:
        """Say what is about to happen, and what it is not where the number of ranks has changed."""
        params, world = self.params, self.world
        if not world.is_main:
            return
        if self.earlier_ranks not in (0, world.world_size):
            tell(
                f"the training had {plural(self.earlier_ranks, 'rank')} and goes on with {world.world_size}: each step has the "
                "same batch, and its sums round otherwise, so from here on losses, gradient norms and weights equal those of "
                "an uninterrupted run nearly, and not bit for bit"
            )
        if self.state.step and world.device.type == "cuda" and not params.deterministic:
            tell(
                "weights, moments, random streams and batches are exactly those of the checkpoint; the steps from here on round "
                "as the GPU's fastest kernels happen to, which train.deterministic: true would prevent"
            )
        begin = f"goes on after step {self.state.step:,}" if self.state.step else "starts"
        tell(
            f"training {begin}: {params.max_steps:,} steps of {params.global_batch_tokens:,} tokens, "
            f"{self.plan.epochs(params.max_steps):.2f} epochs, "
            f"{plural(params.gradient_accumulation_steps(world.world_size), 'micro-step')} of "
            f"{plural(params.micro_batch_rows(world.world_size), 'row')} on each of {plural(world.world_size, 'rank')}, "
            f"{world.device.type}, {params.precision}"
        )
