"""The state that wsd trainings share before their cooldowns, so that a longer training need not start from step 0.

Up to there they are the same: only `HORIZON` says when the rate falls. A training that has ended leaves the checkpoint of that
step and the curves up to it in STATE/trunks/KEY/STEP/. KEY is the hash of everything else that decides the training. A longer one
resumes from it as from a checkpoint of its own, so its result is that of a training that was never cut.
"""

from collections.abc import Mapping
from pathlib import Path

from pipelib.errors import tell
from pipelib.files import remove, replace_folder, sha256_json, write_text
from pipelib.training.checkpoint import CHECKPOINTS, checkpoint_name
from pipelib.training.curves import rows_up_to
from pipelib.training.params import TrainParams
from pipelib.workspace.locks import LOCK, locked
from pipelib.workspace.places import StatePlaces

CHECKPOINT = "checkpoint"
"""The folder of the checkpoint in a trunk; the curves are beside it."""


class Trunk:
    """What trainings with the parameters of one share. There is none with `spike`, which may roll back to before it."""

    def __init__(self, params: TrainParams, inputs: Mapping[str, object], work: Path) -> None:
        """Args:
        inputs: everything that decides the training: its stage's inputs, its code, its number of ranks.
        work: the training's work folder.
        """
        self._exists = params.schedule == "wsd" and params.spike is None
        self._step, self._work = params.cooldown_start, work
        key = sha256_json({**inputs, "train": params.trunk()})
        self._folder = StatePlaces.chosen().trunks / key[:16]

    def take_over(self) -> int:
        """Put the trunk into the work folder of a fresh training, if it does not reach into the training's own cooldown.

        Returns:
            The step from which the training then resumes; 0 if there is no trunk.
        """
        if not self._exists or any((self._work / CHECKPOINTS).glob("step_*")) or not self._fitting():
            return 0
        with locked(self._folder / LOCK, wait=True):
            if (found := self._fitting()) is None:
                return 0
            for curve in found.glob("*.csv"):
                write_text(self._work / curve.name, curve.read_text(encoding="utf-8"))
            # the checkpoint comes last, because a training that has one does not look for a trunk again
            replace_folder(found / CHECKPOINT, self._work / CHECKPOINTS / found.name)
        tell(f"train: resumes from {found}, which a shorter training left before its cooldown")
        return int(found.name.removeprefix("step_"))

    def _fitting(self) -> Path | None:
        last = checkpoint_name(self._step)
        return max((path for path in self._folder.glob("step_*") if path.name <= last), default=None)

    def keep(self) -> None:
        """Keep the state that a finished training had before its cooldown, unless that of a longer one is there."""
        name = checkpoint_name(self._step)
        source, draft = self._work / CHECKPOINTS / name, self._work / "trunk"
        if not self._exists or not source.is_dir():
            return
        try:
            with locked(self._folder / LOCK, wait=True):
                others = [path for path in self._folder.glob("step_*") if path.name != name]
                if any(path.name > name for path in others):
                    return
                replace_folder(source, draft / CHECKPOINT)
                for curve in self._work.glob("*.csv"):
                    write_text(draft / curve.name, rows_up_to(curve.read_text(encoding="utf-8"), self._step))
                replace_folder(draft, self._folder / name)
                for path in others:
                    remove(path)
        except OSError as error:  # the training itself has ended well
            tell(
                f"train: the state before the cooldown is not kept ({error}), so a longer training will start from step 0"
            )
