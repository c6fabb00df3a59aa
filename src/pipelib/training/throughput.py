"""Training throughput: the time of training steps alone, without validations, checkpoints and the first, compiling steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelib.training.hardware import Peak
from pipelib.training.params import TrainParams


@dataclass
class Window:
    """A number of steps and their time."""

    compiles: bool = False
    """Whether it holds the first steps of the process, which compile, so that its speed means nothing."""
    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0
    """Seconds that the steps waited for data."""

    def add(self, steps: int, seconds: float, wait: float) -> None:
        """Add more steps."""
        self.steps, self.seconds, self.wait = self.steps + steps, self.seconds + seconds, self.wait + wait

    @property
    def wait_ms(self) -> float:
        """Mean milliseconds that a step waited for its batch."""
        return 1000 * self.wait / self.steps if self.steps else 0.0


class Throughput:
    """The speed since it was last shown, and the speed of the whole process."""

    def __init__(self, params: TrainParams, flops_per_token: int, measure_peak: Callable[[], Peak]) -> None:
        """Args:
        flops_per_token: of training, forward and backward.
        measure_peak: returns the peak of all devices together. It is called only after the first steps: it may have to
            measure, and at the start other threads of this process are still importing.
        """
        self._params, self._flops, self._measure_peak = params, flops_per_token, measure_peak
        self.peak: Peak | None = None
        self.shown = Window(compiles=True)
        """The steps since progress was last shown."""
        self.whole = Window()
        self._wait = 0.0
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Start the clock: training begins, or resumes after a pause."""
        self._mark = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Count the time that a step waited for its batch."""
        self._wait += seconds

    def forget(self) -> None:
        """Drop the steps since progress was last shown: they were undone."""
        self.shown = Window(self.shown.compiles)
        self.start()

    def count(self, steps: int) -> None:
        """Count `steps` steps, which the device has finished too."""
        seconds = time.perf_counter() - self._mark
        # The first steps of the process compile, so they are not part of the whole.
        if self.shown.steps or not self.shown.compiles:
            self.whole.add(steps, seconds, self._wait)
        self.shown.add(steps, seconds, self._wait)
        self._wait = 0.0
        self.start()

    def take(self) -> Window:
        """Return the steps since the last call."""
        window, self.shown = self.shown, Window()
        return window

    def rate(self, window: Window) -> float:
        """Tokens per second."""
        return window.steps * self._params.global_batch_tokens / window.seconds if window.seconds else 0.0

    def mfu(self, window: Window) -> float:
        """Model FLOP utilization: the share of the devices' peak that the model's operations reach."""
        self.peak = self.peak or self._measure_peak()  # measured once: the device does not change
        return self.rate(window) * self._flops / self.peak.flops
