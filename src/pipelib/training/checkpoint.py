"""Checkpoints: whole and verified, or not there.

A checkpoint is a folder `step_00000100/` with `state.pt`, what `torch.save` makes of one mapping, and `meta.json`, which
is readable and holds the SHA-256 of the other. Both are written under a hidden name, synced, and renamed together. What
the mapping holds is all that survives a kill.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pipelib.files import files_under, read_json, remove, sha256_file, sync_folder, write_atomic, write_json

VERSION = 1
KEPT = 2
"""The newest, and one to fall back on."""


CHECKPOINT_BYTES = 12
"""Of one parameter: itself and Adam's two moments, in fp32."""


class Stateful(Protocol):
    """Anything that can be saved and restored: a module, an optimizer, counters."""

    def state_dict(self) -> dict[str, Any]:
        """What to save."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Restore it."""
        ...


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        identity: what they belong to (configuration, fingerprint of the data); one of another is never loaded.
    """

    def __init__(self, folder: Path, identity: Mapping[str, object]) -> None:
        self.folder, self.identity = folder, dict(identity)

    def save(self, step: int, states: Mapping[str, Stateful], meta: Mapping[str, object]) -> None:
        """Save the states after `step` finished steps, and drop the oldest beyond `KEPT`."""
        target = self.folder / f"step_{step:08d}"
        fresh = self.folder / f".step_{step:08d}.tmp"
        remove(fresh)
        fresh.mkdir(parents=True)
        with write_atomic(fresh / "state.pt") as file:
            saved = {name: stateful.state_dict() for name, stateful in states.items()}
            try:
                torch.save(saved, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        write_json(
            fresh / "meta.json",
            {"version": VERSION, "step": step, "sha256": sha256_file(fresh / "state.pt"), **self.identity, **meta},
        )
        remove(target)
        fresh.rename(target)
        sync_folder(self.folder)
        for old in self._all()[:-KEPT]:
            shutil.rmtree(old)

    def load_latest(self, states: Mapping[str, Stateful]) -> int:
        """Restore the newest checkpoint that is whole and of this run, and return its step; 0 where there is none."""
        for path in reversed(self._all()):
            problem = self._problem(path)
            if problem:
                print(f"{path} {problem}, so it is not used", flush=True)
                continue
            saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            for name, stateful in states.items():
                stateful.load_state_dict(saved[name])
            return int(read_json(path / "meta.json")["step"])
        return 0

    def wait(self) -> None:
        """Wait until what was saved is on disk."""

    def newest(self) -> Path | None:
        """The newest checkpoint."""
        return next(reversed(self._all()), None)

    def _all(self) -> list[Path]:
        """Every checkpoint, oldest first."""
        return sorted(self.folder.glob("step_*"))

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
        if any(meta.get(key) != value for key, value in self.identity.items()):
            return "belongs to another run"
        if sha256_file(path / "state.pt") != meta["sha256"]:
            return "is damaged: its bytes are not those that were saved"
        return None


class Counters:
    """How far the training is."""

    def __init__(self) -> None:
        self.step = 0
        """Finished optimizer steps."""
        self.tokens = 0
        """Tokens trained on."""

    def state_dict(self) -> dict[str, int]:
        """See `Stateful`."""
        return {"step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int], /) -> None:
        """See `Stateful`."""
        self.step, self.tokens = state["step"], state["tokens"]


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
