"""Checkpoints: whole and verified, or not there.

A checkpoint is a folder `step_00000100/` with `state.pt`, what `torch.save` makes of one mapping, and `meta.json`, which
is readable and holds the SHA-256 of the other. Both are written under a hidden name, synced, and renamed together, on a
thread and from a copy in host memory, while the training goes on. What the mapping holds is all that survives a kill.
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
from pipelib.training.launch.machines import wait_for_file
from pipelib.training.memory import Footprint

VERSION = 2
KEPT = 2
"""The newest, and one to fall back on; the one with the least validation loss stays besides."""
CHECKPOINTS = "checkpoints"
"""The folder of a training's checkpoints, in its state."""


def checkpoint_bytes(footprint: Footprint, checkpoint_every: int) -> int:
    """The most bytes that a training's checkpoints take on disk at a time."""
    spike = footprint.train.spike
    return most_checkpoints(spike.batches if spike else 0, checkpoint_every) * footprint.checkpoint


def most_checkpoints(reach: int, checkpoint_every: int) -> int:
    """The most checkpoints that are on disk at a time: those that stay, the best one, and the one being written.

    Args:
        reach: of `Checkpoints`. Within it and one before it all stay, also one of a step at which the training was stopped.
    """
    return max(KEPT, -(-reach // checkpoint_every) + 2 if reach else 0) + 2


class Stateful(Protocol):
    """Anything that can be saved and restored: a module, an optimizer, counters."""

    def state_dict(self) -> dict[str, Any]:
        """What to save."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Restore it."""
        ...


class Checkpoints:
    """The checkpoints of one run; leaving its `with` block waits until they are on disk.

    Args:
        folder: where they lie.
        identity: what they belong to (configuration, fingerprint of the data); one of another is never loaded.
        reach: the steps that a training may go back from any step to come; one from before them stays.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object], reach: int = 0) -> None:
        self.folder, self.identity, self._reach = folder, dict(identity), reach
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
        """Copy the states after `step` finished steps, and start to write them once the save before is done.

        The oldest checkpoints beyond `KEPT` and beyond reach go, but never the best, the one with the least validation loss.

        Args:
            val_loss: after this very step, where it was measured.
            before: comes first on the thread: what has to be on disk before the checkpoint is.

        Raises:
            OSError: the save before failed.
        """
        self.wait()
        saved = {name: _to_host(stateful.state_dict()) for name, stateful in states.items()}
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies are asynchronous
        if val_loss is not None and not math.isfinite(val_loss):
            val_loss = None
        self._writing = self._thread.submit(self._write, step, saved, {**meta, "val_loss": val_loss}, before)

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            OSError: it cannot be written.
        """
        if self._writing:
            writing, self._writing = self._writing, None
            writing.result()

    def check(self) -> None:
        """Raise what `wait` would, without waiting."""
        if self._writing and self._writing.done():
            self.wait()

    def _write(self, step: int, saved: dict[str, Any], meta: Mapping[str, object], before: Callable[[], None]) -> None:
        before()
        target = self.folder / f"step_{step:08d}"
        fresh = self.folder / f".step_{step:08d}.tmp"
        remove(fresh)
        fresh.mkdir(parents=True)
        with write_atomic(fresh / "state.pt") as file:
            try:
                torch.save(saved, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        losses = {**self._val_losses(), target: meta["val_loss"]}
        measured = {path: loss for path, loss in losses.items() if isinstance(loss, float)}
        best = min(sorted(measured), key=measured.__getitem__, default=None)
        about = {"version": VERSION, "step": step, "sha256": sha256_file(fresh / "state.pt")}
        write_json(fresh / "meta.json", {**about, **self.identity, **meta, "best": best and best.name})
        remove(target)
        fresh.rename(target)
        sync_folder(self.folder)
        for old in self._all(step + 1 - self._reach)[:-1]:
            if old != best and old not in self._all()[-KEPT:]:
                shutil.rmtree(old)

    def load_latest(
        self,
        states: Mapping[str, Stateful],
        at_most: int | None = None,
        agree: Callable[[Callable[[], str]], str] = lambda look: look(),
    ) -> int:
        """Restore the newest checkpoint that is whole and of this run, and return its step; 0 where there is none.

        Args:
            at_most: the last step that is looked at.
            agree: has one rank look and gives all what it found; each by itself could see another one as the newest.
        """
        self.wait()
        name = agree(lambda: self._newest_sound(at_most))
        if not name:
            return 0
        path = self.folder / name
        wait_for_file(path / "state.pt")  # another machine may have written it
        # mapped where every tensor is copied to a GPU anyway, so that the ranks of a machine share the memory
        saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=torch.cuda.is_available())
        for key, stateful in states.items():
            stateful.load_state_dict(saved[key])
        return int(name.removeprefix("step_"))

    def _newest_sound(self, at_most: int | None) -> str:
        """The name of the newest checkpoint that is whole and of this run; empty where there is none. Says what is wrong
        with newer ones."""
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
        """Remove the checkpoints of later steps: the training took another way from `step` on."""
        for path in reversed(self._all()[len(self._all(step)) :]):
            shutil.rmtree(path)

    def _all(self, at_most: int | None = None) -> list[Path]:
        """Every checkpoint, or those up to a step, oldest first."""
        paths = sorted(self.folder.glob("step_*"))
        return [path for path in paths if at_most is None or int(path.name.removeprefix("step_")) <= at_most]

    def _val_losses(self) -> dict[Path, object]:
        """What each checkpoint of this run notes of its validation loss."""
        losses = {}
        for path in self._all():
            try:
                meta = read_json(path / "meta.json")
            except ValueError:
                continue
            if not self._foreign(meta):
                losses[path] = meta.get("val_loss")
        return losses

    def _foreign(self, meta: Mapping[str, object]) -> list[str]:
        """In what a checkpoint belongs to another run."""
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
        if foreign := self._foreign(meta):
            return f"belongs to another run, with another {' and '.join(foreign)}"
        if not isinstance(meta.get("step"), int):
            return "has a meta.json that does not say its step"
        if sha256_file(path / "state.pt") != meta.get("sha256"):
            return "is damaged: its bytes are not those that were saved"
        return None


def _to_host(state: Any) -> Any:
    """A copy of a state that shares no tensor with it, in host memory, pinned where it comes from a GPU."""
    if isinstance(state, Tensor):
        if state.device.type == "cpu":
            return state.clone()
        return torch.empty_like(state, device="cpu", pin_memory=True).copy_(state, non_blocking=True)
    if isinstance(state, dict):
        copied = copy(state)  # of its kind, with what torch notes beside the entries
        for key, value in state.items():
            copied[key] = _to_host(value)
        return copied
    return [_to_host(value) for value in state] if isinstance(state, list) else state


class RandomState:
    """torch's random streams, of the CPU and of this rank's GPU."""

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
