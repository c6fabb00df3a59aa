"""What is left of a training when it is killed, besides its model, optimizer and random streams: all of it is here."""

import time
from typing import Any


class TrainState:
    """How far the training is, and what later processes must know of earlier ones."""

    def __init__(self) -> None:
        self.step = 0
        """Finished optimizer steps."""
        self.tokens = 0
        """Tokens trained on."""
        self.world_size = 0
        """Ranks that took the last steps; 0 before the first."""
        self.micro_batch_size = 0
        """Rows that each rank ran at a time then: `auto` keeps to it, since other rows round otherwise."""

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        vars(self).update(state)


class DeviceHours:
    """Hours of GPUs, or of processes on a CPU, that the training took: all of it, compiling and evaluating included, also
    before it was stopped, but without the steps that a kill undid."""

    def __init__(self, world_size: int) -> None:
        self._world_size, self._began = world_size, time.monotonic()
        self._earlier: float | None = None

    @property
    def total(self) -> float:
        """Until now."""
        return (self._earlier or 0.0) + (time.monotonic() - self._began) * self._world_size / 3600

    def state_dict(self) -> dict[str, float]:
        """See `Stateful`."""
        return {"hours": self.total}

    def load_state_dict(self, state: dict[str, float], /) -> None:
        """See `Stateful`. A training that goes back within this process has used its hours all the same."""
        if self._earlier is None:
            self._earlier = state["hours"]
