"""The training page: from the first step, or from the last checkpoint, to the last step.

All that survives a kill is in `states`. The batch of a step follows from the step number and from the batches that are
skipped, so the loader has no state. `build.py` makes the parts.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from torch import nn

from pipelib.errors import UserError, tell
from pipelib.files import plural
from pipelib.model.decoder import Decoder
from pipelib.model.device import device_title
from pipelib.processes import on_first_signal
from pipelib.tokens.loader import BatchPlan, Loader
from pipelib.training.batches import TensorBatch
from pipelib.training.checkpoint import Checkpoints, Stateful
from pipelib.training.determinism import gc_at_pauses_only
from pipelib.training.guards import Guards, RollBack, Stop
from pipelib.training.launch.distributed import World
from pipelib.training.launch.stopping import StopRequest
from pipelib.training.learning_rate import learning_rate_at
from pipelib.training.loss_scale import NoLossScale
from pipelib.training.objectives import Objective
from pipelib.training.optimizer import Optimizer
from pipelib.training.params import TrainParams
from pipelib.training.probes import Probe, Validation
from pipelib.training.schedule import LOG, SAVE, VALIDATE, Schedule
from pipelib.training.spikes import Spike, Spikes
from pipelib.training.state import DeviceHours, TrainState
from pipelib.training.step import take_step
from pipelib.training.training_log import TrainingLog
from pipelib.training.update_sizes import UpdateSizes


@dataclass
class Trainer:
    """One rank's training: its parts, and the loop that uses them."""

    params: TrainParams
    """`micro_batch_size` is a number here, never `auto`."""
    schedule: Schedule
    world: World

    model: Decoder
    objective: Objective
    """The loss that the model minimizes."""
    network: nn.Module
    """The objective as this rank runs it: compiled if `train.compile` is set, and wrapped if there are several ranks."""
    optimizer: Optimizer
    update_sizes: UpdateSizes
    """Takes the steps of the optimizer that are measured."""
    loss_scale: NoLossScale
    loader: Loader[TensorBatch]
    plan: BatchPlan

    state: TrainState
    spikes: Spikes
    hours: DeviceHours
    states: Mapping[str, Stateful]
    """All that survives a kill."""
    previous_world_size: int
    """Ranks that took the steps up to the checkpoint; 0 in a fresh run."""

    checkpoints: Checkpoints
    guards: Guards
    validation: Validation
    probes: Sequence[Probe]
    """The validation, and whatever else is measured."""
    log: TrainingLog
    stop_request: StopRequest
    explain_out_of_memory: Callable[[], AbstractContextManager[None]]

    def run(self) -> Decoder:
        """Take the remaining steps and return the model, on this rank's device.

        Raises:
            UserError: a loss or gradient norm is not finite; memory ran out; a signal stopped the run, which saved a checkpoint.
        """
        with self._session():
            while self.state.step < self.params.max_steps:
                self._take_step()
                due = self.schedule.due(self.state.step)
                verdict = self.guards.check(wait=bool(due))  # what is due waits for the device anyway
                if isinstance(verdict, RollBack):
                    self._roll_back(verdict.spike)
                    continue
                if LOG in due:
                    self.log.flush()
                    self.checkpoints.raise_if_failed()
                for probe in self.probes:
                    if probe.event in due:
                        probe.run(self.model, self.state, self.log)
                if SAVE in due or isinstance(verdict, Stop):
                    self._save_checkpoint()
                if isinstance(verdict, Stop) and self.state.step < self.params.max_steps:
                    self._stop_early(verdict)
        return self.model

    @contextmanager
    def _session(self) -> Iterator[None]:
        """Prepare the first step. While steps run: note signals, explain out-of-memory errors, write checkpoints."""
        self.log.begin(self.state.step, self.spikes)
        self._announce()
        with (
            self.explain_out_of_memory(),
            on_first_signal(self.stop_request.note),
            gc_at_pauses_only(),
            self.checkpoints,
        ):
            rows = self.params.micro_batch_rows(self.world.world_size)
            dummy = self.objective.dummy_batch(rows, self.params.sequence_length)
            self.world.warm_up(self.network, dummy, self.params.precision)
            if not self.state.step:
                # The loss before any training: near ln(vocab_size) for random weights.
                self.validation.run(self.model, self.state, self.log)
                if self.params.spike:
                    self._save_checkpoint()  # a spike among the first steps rolls back to this one
            yield

    def _take_step(self) -> None:
        """Take one optimizer step and note its result, without waiting for the device."""
        params, state, step = self.params, self.state, self.state.step
        # The batch number is the step number, plus the batches that spikes have skipped.
        batch = self.spikes.batch_of(step)
        if step and self.spikes.batch_of(step - 1) < self.plan.first_step(epoch=1) <= batch:
            self.log.say(
                f"step {step + 1:,}: epoch 2 of {self.plan.epochs(params.max_steps):.2f} begins, so rows repeat from here on"
            )
        learning_rate = learning_rate_at(step, params)
        micro_batches = self.loader.micro_batches(batch)
        # All ranks have equal shares, so this rank's share gives the global batch.
        tokens = self.world.world_size * sum(batch[1].numel() for batch in micro_batches)
        assert tokens == params.global_batch_tokens, f"step {step + 1} has {tokens} tokens"
        measures = self.world.is_main and VALIDATE in self.schedule.due(step + 1)
        result = take_step(
            self.network,
            self.objective,
            self.update_sizes if measures else self.optimizer,
            micro_batches,
            learning_rate,
            params,
            self.world,
            self.stop_request.signal(),
            self.loss_scale,
        )
        state.step, state.tokens = step + 1, state.tokens + tokens
        assert state.tokens == state.step * params.global_batch_tokens
        self.log.step(state, result, learning_rate, self.loader.wait)
        if measures:
            self.log.updated(state, self.update_sizes.last)
        self.guards.note(state.step, learning_rate, result)

    def _save_checkpoint(self) -> None:
        """Start to save a checkpoint on rank 0; a thread writes it while training continues."""
        with self.log.pause():
            if self.world.is_main:
                self.state.world_size = self.world.world_size
                self.state.micro_batch_size = self.params.micro_batch_rows(self.world.world_size)
                val_loss = self.validation.loss_at(self.state.step)
                self.checkpoints.save(
                    self.state.step, self.states, {"tokens": self.state.tokens}, val_loss, self.log.sync
                )

    def _roll_back(self, spike: Spike) -> None:
        """Load a checkpoint from before a spike, and skip the batches that caused it from now on."""
        found = [*self.spikes.found, spike]  # kept here, since loading restores an older list
        self.checkpoints.wait()
        self.world.barrier()  # rank 0 has written its checkpoint before any rank looks for one
        before = max(0, spike.step - self.spikes.rollback_depth)
        self.checkpoints.load_latest(self.states, before, self.world.from_rank_0)
        if self.state.step >= spike.step:
            raise UserError(
                f"step {spike.step} has loss {spike.loss}, where train.spike allows {spike.limit:.4f}, and there is no usable "
                "checkpoint from before it, so training stopped; start again with PIPELIB_RESUME=fresh."
            )
        self.spikes.found = found
        self.world.barrier()  # every rank has loaded before rank 0 removes later checkpoints
        if self.world.is_main:
            self.checkpoints.drop_after(self.state.step)
        self.log.rolled_back(self.state.step, self.spikes)

    def _stop_early(self, stop: Stop) -> None:
        """Raise, once the checkpoint is on disk."""
        self.checkpoints.wait()
        self.world.barrier()  # when one rank exits, torchrun kills the others, which may still be busy
        raise UserError(
            f"stopped by {signal.Signals(stop.signal).name} after step {self.state.step:,}, which is saved; run dvc repro to "
            "resume from there."
        )

    def _announce(self) -> None:
        """Print what is about to run, and a warning if a resumed run will not be bit-identical."""
        params, world = self.params, self.world
        if not world.is_main:
            return
        if self.previous_world_size not in (0, world.world_size):
            tell(
                f"the training had {plural(self.previous_world_size, 'rank')} and resumes with {world.world_size}: each step has "
                "the same batch, but its sums round differently, so from here on losses, gradient norms and weights are close "
                "to those of an uninterrupted run, not bit-identical"
            )
        if self.state.step and world.device.type == "cuda" and not params.deterministic:
            tell(
                "weights, moments, random streams and batches are exactly those of the checkpoint; the next steps may round "
                "differently, because the GPU's fastest kernels are not deterministic; "
                f"{params.section}.deterministic: true prevents it"
            )
        begin = f"resumes after step {self.state.step:,}" if self.state.step else "starts"
        tell(
            f"training {begin}: {params.max_steps:,} steps of {params.global_batch_tokens:,} tokens, "
            f"{self.plan.epochs(params.max_steps):.2f} epochs, "
            f"{plural(params.gradient_accumulation_steps(world.world_size), 'micro-step')} of "
            f"{plural(params.micro_batch_rows(world.world_size), 'row')} on each of {plural(world.world_size, 'rank')}, "
            f"{device_title(world.device)}, {params.precision}"
        )
