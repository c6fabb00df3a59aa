"""Loss scaling for fp16, whose smallest numbers are 2^16 times larger than those of bf16: small gradients would become zero.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it afterwards, which is
exact. If a gradient overflows, the step is skipped and the scale halved; after `GROWTH_STEPS` good steps it is doubled
(Micikevicius et al., Mixed Precision Training, 2018; the numbers are those of torch's GradScaler). All values stay on the
device, so that the host does not wait.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class NoLossScale:
    """For fp32 and bf16: change nothing."""

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is computed."""
        return loss

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the scale."""

    def update(self, finite: Tensor) -> Tensor:
        """Choose the next step's scale.

        Args:
            finite: whether this step's losses and gradients were finite, a boolean scalar on the device.

        Returns:
            Whether a smaller scale may make them finite, a boolean scalar on the device.
        """
        return torch.zeros_like(finite)


class LossScale(NoLossScale):
    """The scale of the next step, and how many good steps it has had. Both survive a kill (`Stateful`)."""

    def __init__(self, device: torch.device) -> None:
        self._scale = torch.tensor(FIRST_SCALE, device=device)
        self._good_steps = torch.tensor(0, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """See `NoLossScale`."""
        return loss * self._scale

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """See `NoLossScale`."""
        torch._foreach_mul_([parameter.grad for parameter in parameters if parameter.grad is not None], 1 / self._scale)

    def update(self, finite: Tensor) -> Tensor:
        """See `NoLossScale`. At a scale of 1 the gradients themselves are too large for fp16."""
        too_large = ~finite & (self._scale > 1)
        good = torch.where(finite, self._good_steps + 1, 0)
        grows = good == GROWTH_STEPS
        self._scale = torch.where(
            finite, torch.where(grows, 2 * self._scale, self._scale), (self._scale / 2).clamp(min=1.0)
        )
        self._good_steps = torch.where(grows, 0, good)
        return too_large

    def state_dict(self) -> dict[str, Any]:
        """See `Stateful`."""
        return {"scale": self._scale.clone(), "good_steps": self._good_steps.clone()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `Stateful`."""
        self._scale, self._good_steps = (state[name].to(self._scale.device) for name in ("scale", "good_steps"))


def loss_scale(precision: str, device: torch.device) -> NoLossScale:
    """The loss scale that a precision needs."""
    return LossScale(device) if precision == "fp16" else NoLossScale()
