"""The learning rate of every step."""

import math

from pipelib.training.params import TrainParams


def learning_rate_at(step: int, params: TrainParams) -> float:
    """The learning rate of step `step`, counted from 0: linear warmup, then from `max_lr` towards `min_lr` as `schedule` says.

    The first step has max_lr / warmup_steps, the step after warmup has max_lr, and min_lr would be reached at step max_steps, one
    step after the last. Cosine is GPT-3's schedule in build-nanogpt's form.
    """
    if step < params.warmup_steps:
        return params.max_lr * (step + 1) / params.warmup_steps
    if step < params.cooldown_start:
        return params.max_lr
    first = params.cooldown_start or params.warmup_steps
    progress = (step - first) / (params.max_steps - first)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if params.schedule == "cosine" else 1 - progress
    return params.min_lr + (params.max_lr - params.min_lr) * left
