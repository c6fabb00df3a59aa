"""How fast a training goes: training alone, without validations, checkpoints and the first steps, which compile."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelib.training.hardware import Peak
from pipelib.training.params import TrainParams


@dataclass
class Window:
    """Some steps, and what they took."""

    compiles: bool = False
    """Whether the first steps of the process are in it, so that its speed says nothing."""
    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    """Seconds that steps waited for data."""

    def add(self, steps: int, seconds: float, wait: float) -> None:
        """Count more steps."""
        self.steps, self.seconds, self.wait = self.steps + steps, self.seconds + seconds, self.wait + wait

    @property
    def wait_ms(self) -> float:
        """Milliseconds that a step waited for its batch, on average."""
        return 1000 * self.wait / self.steps if self.steps else 0.0


class Throughput:
    """The speed since it was last shown, and of the whole process."""

    def __init__(self, params: TrainParams, flops_per_token: int, measure_peak: Callable[[], Peak]) -> None:
        """Args:
        flops_per_token: of training, forward and backward.
        measure_peak: the peak of all devices together. It is asked when the first steps are done, since a peak may have
            to be measured, and at the start other threads of this process are still importing.
        """
        self._params, self._flops, self._measure_peak = params, flops_per_token, measure_peak
        self.peak: Peak | None = None
        self.shown = Window(compiles=True)
        """The steps since progress was shown last."""
        self.whole = Window()
        self._wait = 0.0
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Training begins, or resumes after something else."""
        self._mark = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """A step waited for its batch."""
        self._wait += seconds

    def forget(self) -> None:
        """The steps since progress was shown last were undone."""
        self.shown = Window(self.shown.compiles)
        self.start()

    def count(self, steps: int) -> None:
        """So many steps are done, on the device too."""
        seconds = time.perf_counter() - self._mark
        if self.shown.steps or not self.shown.compiles:
            self.whole.add(steps, seconds, self._wait)
        self.shown.add(steps, seconds, self._wait)
        self._wait = 0.0
        self.start()

    def take(self) -> Window:
        """The steps since this was called last."""
        window, self.shown = self.shown, Window()
        return window

    def rate(self, window: Window) -> float:
        """Tokens a second."""
        return window.steps * self._params.global_batch_tokens / window.seconds if window.seconds else 0.0

    def mfu(self, window: Window) -> float:
        """Model FLOP utilisation."""
        self.peak = self.peak or self._measure_peak()
        return self.rate(window) * self._flops / self.peak.flops
