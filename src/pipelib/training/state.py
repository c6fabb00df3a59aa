"""The rest of a training's state, beside its model, optimizer, random streams and spikes: all that survives a kill."""

import time
from typing import Any


class TrainState:
    """How far the training is, and what a resumed run must know about the earlier processes."""

    def __init__(self) -> None:
        self.step = 0
        """Finished optimizer steps."""
        self.tokens = 0
        """Tokens trained on."""
        self.world_size = 0
        """Ranks that took the last steps; 0 before the first step."""
        self.micro_batch_size = 0
        """Rows that each rank ran at a time. `auto` keeps this number, since another one would round differently."""

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        vars(self).update(state)


class DeviceHours:
    """Hours of GPUs, or of CPU processes, that the training took.

    They include compiling, evaluating and the time before a stop, but not the steps that a kill undid.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size, self._began = world_size, time.monotonic()
        self._earlier: float | None = None

    @property
    def total(self) -> float:
        """The hours until now."""
        return (self._earlier or 0.0) + (time.monotonic() - self._began) * self._world_size / 3600

    def state_dict(self) -> dict[str, float]:
        """See `Stateful`."""
        return {"hours": self.total}

    def load_state_dict(self, state: dict[str, float], /) -> None:
        """See `Stateful`. Only the first load counts: a rollback within this process does not give hours back."""
        if self._earlier is None:
            self._earlier = state["hours"]
