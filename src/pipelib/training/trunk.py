"""Going on: the state of a wsd training before its cooldown, from which a longer training of the same data starts.

Up to there the two are the same: only `HORIZON` decides when the rate falls. The state is a checkpoint and the curves up to it,
in STATE/trunks/KEY/; KEY is the hash of everything else that decides the training. A training that takes it over resumes from it
as from a checkpoint of its own, so its result is that of one that was never cut.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from pipelib.errors import tell
from pipelib.files import link_or_copy, remove, sha256_json
from pipelib.training.checkpoint import CHECKPOINTS, checkpoint_name
from pipelib.training.params import TrainParams
from pipelib.workspace.locks import LOCK, InUseError, locked
from pipelib.workspace.places import StatePlaces


class Trunk:
    """The kept state that belongs to a training; only wsd has one."""

    def __init__(self, params: TrainParams, decides: Mapping[str, object], work: Path) -> None:
        """Args:
        decides: everything else that decides the training.
        work: the training's work folder.
        """
        self._params, self._work = params, work
        key = sha256_json({"train": params.trunk(), **decides})
        self._folder = StatePlaces.chosen().trunks / key[:16]

    def take_over(self) -> None:
        """Put the state into the work folder of a fresh training, unless it reaches into this training's own cooldown."""
        if self._params.schedule != "wsd" or any((self._work / CHECKPOINTS).glob("step_*")):
            return
        try:
            with locked(self._folder / LOCK):
                self._take_over()
        except InUseError:
            return  # another training takes it or replaces it at this moment; this one starts from nothing

    def _take_over(self) -> None:
        last = checkpoint_name(self._params.cooldown_start)
        found = max((path for path in self._folder.glob("step_*") if path.name <= last), default=None)
        if found is None:
            return
        tell(f"train: goes on from {found}, which an earlier training had before its cooldown")
        for curve in self._folder.glob("*.csv"):
            shutil.copyfile(curve, self._work / curve.name)  # the training cuts it back, and adds to it
        _link_folder(found, self._work / CHECKPOINTS / found.name)

    def keep(self) -> None:
        """Keep the state that a finished training had before its cooldown, instead of an earlier one."""
        name = checkpoint_name(self._params.cooldown_start)
        source = self._work / CHECKPOINTS / name
        if self._params.schedule != "wsd" or not source.is_dir():
            return
        try:
            with locked(self._folder / LOCK):
                for curve in self._work.glob("*.csv"):
                    remove(self._folder / curve.name)
                    shutil.copyfile(curve, self._folder / curve.name)
                remove(self._folder / name)
                _link_folder(source, self._folder / name)
                for earlier in self._folder.glob("step_*"):
                    if earlier.name < name:
                        remove(earlier)
        except InUseError:
            return


def _link_folder(source: Path, target: Path) -> None:
    """Link every file; meta.json, without which a checkpoint does not count, is the last."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir(), reverse=True):
        link_or_copy(file, target / file.name)
