"""Checkpoints: whole and verified, or not there.

A checkpoint is a folder `step_00000100/` with two files: `state.pt`, one mapping saved by `torch.save`, and `meta.json`,
which is readable and holds the SHA-256 of `state.pt`. Both are written under a hidden name, synced, and renamed together.
A thread does this from a copy in host memory, while training continues. The mapping is all that survives a kill.
"""

import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from pipelib.errors import tell
from pipelib.files import files_under, read_json, remove, sha256_file, sync_folder, write_atomic, write_json
from pipelib.model.device import gpu_in_use
from pipelib.training.launch.machines import wait_for_file
from pipelib.training.memory import Footprint

VERSION = 2
KEPT = 2
"""Checkpoints that stay: the newest, and one to fall back on. The one with the lowest validation loss stays too."""
CHECKPOINTS = "checkpoints"
"""The name of the checkpoint folder in a training's work folder."""


def checkpoint_name(step: int) -> str:
    """The folder of a checkpoint; names are in the order of the steps."""
    return f"step_{step:08d}"


def checkpoint_bytes(footprint: Footprint, checkpoint_every: int) -> int:
    """The most bytes that a training's checkpoints take on disk at the same time."""
    train = footprint.train
    most = most_checkpoints(train.spike.batches if train.spike else 0, checkpoint_every)
    return (most + (train.schedule == "wsd")) * footprint.checkpoint


def most_checkpoints(reach: int, checkpoint_every: int) -> int:
    """The most checkpoints on disk at the same time: those that stay, the best one, and the one being written.

    Args:
        reach: as in `Checkpoints`. All checkpoints within reach stay, and one before it. One may come from a stop, between
            two multiples of `checkpoint_every`.
    """
    return max(KEPT, -(-reach // checkpoint_every) + 2 if reach else 0) + 2


class Stateful(Protocol):
    """Anything that can be saved and restored: a module, an optimizer, counters."""

    def state_dict(self) -> dict[str, Any]:
        """Return what to save."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Restore what was saved."""
        ...


class Checkpoints:
    """The checkpoints of one run. Leaving its `with` block waits until they are on disk.

    Args:
        folder: where the checkpoints are.
        identity: what they belong to (configuration, fingerprint of the data). A checkpoint with another identity is never
            loaded.
        reach: how many steps a training may roll back from any later step. One checkpoint from before them always stays.
        pinned_step: the step of a checkpoint that always stays, see `trunk.py`; 0 for none.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], reach: int = 0, pinned_step: int = 0) -> None:
        self.folder, self.identity, self._reach = folder, dict(identity), reach
        self._pinned = checkpoint_name(pinned_step) if pinned_step else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if kind is None:
            self.wait()

    def save(
        self,
        step: int,
        states: Mapping[str, Stateful],
        meta: Mapping[str, object],
        val_loss: float | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the states after `step` finished steps, then start to write them. Wait for the previous save first.

        Writing removes the oldest checkpoints beyond `KEPT` and beyond reach, but never the one with the lowest validation
        loss.

        Args:
            val_loss: the loss after exactly this step, if it was measured.
            before: called first on the thread; it puts on disk whatever the checkpoint relies on.

        Raises:
            OSError: the previous save failed.
        """
        self.wait()
        saved = {name: _to_host(stateful.state_dict()) for name, stateful in states.items()}
        if gpu_in_use():
            torch.cuda.current_stream().synchronize()  # the copies are asynchronous
        if val_loss is not None and not math.isfinite(val_loss):
            val_loss = None  # it is never the best, and JSON cannot hold it
        self._writing = self._thread.submit(self._write, step, saved, {**meta, "val_loss": val_loss}, before)

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def raise_if_failed(self) -> None:
        """Raise the error of a failed save, without waiting for one that is still running."""
        if self._writing and self._writing.done():
            self.wait()

    def _write(self, step: int, saved: dict[str, Any], meta: Mapping[str, object], before: Callable[[], None]) -> None:
        before()
        # Write both files under a hidden name, the state first: meta.json holds its hash.
        target = self.folder / checkpoint_name(step)
        temporary = self.folder / f".{target.name}.tmp"
        remove(temporary)
        temporary.mkdir(parents=True)
        with write_atomic(temporary / "state.pt") as file:
            try:
                torch.save(saved, file)
            except RuntimeError as error:  # torch wraps the OSError of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        losses = {**self._val_losses(), target: meta["val_loss"]}
        measured = {path: loss for path, loss in losses.items() if isinstance(loss, float)}
        best = min(sorted(measured), key=measured.__getitem__, default=None)
        about = {"version": VERSION, "step": step, "sha256": sha256_file(temporary / "state.pt")}
        write_json(temporary / "meta.json", {**about, **self.identity, **meta, "best": best and best.name})
        # The rename makes the checkpoint visible, whole; the sync of the folder makes it survive a power cut.
        remove(target)
        temporary.rename(target)
        sync_folder(self.folder)
        # Only now remove old ones, so that a kill at any moment leaves a checkpoint to resume from.
        for old in self._all(step + 1 - self._reach)[:-1]:
            if old != best and old.name != self._pinned and old not in self._all()[-KEPT:]:
                shutil.rmtree(old)

    def load_latest(
        self,
        states: Mapping[str, Stateful],
        at_most: int | None = None,
        agree: Callable[[Callable[[], str]], str] = lambda find: find(),
    ) -> int:
        """Restore the newest valid checkpoint of this run and return its step; 0 if there is none.

        Args:
            at_most: ignore checkpoints of later steps.
            agree: lets one rank search and gives its result to all. If each rank searched, two could find different ones.
        """
        self.wait()
        name = agree(lambda: self._newest_valid(at_most))
        if not name:
            return 0
        path = self.folder / name
        wait_for_file(path / "state.pt")  # another machine may have written it
        # Memory-mapped on a GPU, where every tensor is copied to the device anyway: the ranks of a machine share the pages.
        saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=gpu_in_use())
        for key, stateful in states.items():
            stateful.load_state_dict(saved[key])
        return int(name.removeprefix("step_"))

    def _newest_valid(self, at_most: int | None) -> str:
        """The name of the newest valid checkpoint of this run; empty if there is none. Prints what is wrong with newer ones."""
        for path in reversed(self._all(at_most)):
            problem = self._problem(path)
            if not problem:
                return path.name
            tell(f"{path} {problem}, so it is not used")
        return ""

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self._all()), None)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints of later steps, which a rollback to `step` undid."""
        for path in reversed(self._all()[len(self._all(step)) :]):
            shutil.rmtree(path)

    def _all(self, at_most: int | None = None) -> list[Path]:
        """Every checkpoint, or those up to a step, oldest first."""
        paths = sorted(self.folder.glob("step_*"))
        return [path for path in paths if at_most is None or int(path.name.removeprefix("step_")) <= at_most]

    def _val_losses(self) -> dict[Path, object]:
        """The validation loss in each checkpoint's meta.json, for checkpoints of this run."""
        losses = {}
        for path in self._all():
            try:
                meta = read_json(path / "meta.json")
            except ValueError:
                continue
            if not self._mismatch(meta):
                losses[path] = meta.get("val_loss")
        return losses

    def _mismatch(self, meta: Mapping[str, object]) -> list[str]:
        """The keys in which a checkpoint's identity differs from this run's."""
        return [key for key, value in self.identity.items() if meta.get(key) != value]

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint cannot be used, or None."""
        if {file.name for file in files_under(path)} != {"meta.json", "state.pt"}:
            return "is incomplete"
        try:
            meta = read_json(path / "meta.json")
        except ValueError:
            return "has an unreadable meta.json"
        if meta.get("version") != VERSION:
            return f"has format {meta.get('version')} and this code reads {VERSION}"
        if differing := self._mismatch(meta):
            return f"belongs to another run, with another {' and '.join(differing)}"
        if not isinstance(meta.get("step"), int):
            return "has a meta.json without a step"
        if sha256_file(path / "state.pt") != meta.get("sha256"):
            return "is damaged: its bytes are not those that were saved"
        return None


def _to_host(state: Any) -> Any:
    """Copy a state to host memory, sharing no tensor with it. Copies from a GPU are pinned and asynchronous."""
    if isinstance(state, Tensor):
        if state.device.type == "cpu":
            return state.clone()
        return torch.empty_like(state, device="cpu", pin_memory=True).copy_(state, non_blocking=True)
    if isinstance(state, dict):
        copied = copy(state)  # keeps the type and attributes such as `_metadata`, which torch reads when loading
        for key, value in state.items():
            copied[key] = _to_host(value)
        return copied
    return [_to_host(value) for value in state] if isinstance(state, list) else state


class RandomState:
    """The state of torch's random generators, on the CPU and on this rank's GPU."""

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        state = {"cpu": torch.get_rng_state()}
        if gpu_in_use():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and gpu_in_use():
            torch.cuda.set_rng_state(state["cuda"])
