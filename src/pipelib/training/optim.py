"""AdamW with decay on matrices only, and the learning rate of every step."""

import math

import torch
from torch import nn

from pipelib.training.params import TrainParams


def make_optimizer(model: nn.Module, params: TrainParams) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019), fused; biases and LayerNorms do not decay (GPT-3, appendix B)."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": params.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=params.max_lr, betas=(params.beta1, params.beta2), eps=params.eps, fused=True)


def learning_rate_at(step: int, params: TrainParams) -> float:
    """The rate of step `step`, counted from 0: linear warmup, then a cosine from `max_lr` towards `min_lr`.

    GPT-3's schedule in build-nanogpt's form: the first step has max_lr / warmup_steps, the step after warmup has max_lr,
    and min_lr would be reached at step max_steps, one after the last.
    """
    if step < params.warmup_steps:
        return params.max_lr * (step + 1) / params.warmup_steps
    progress = (step - params.warmup_steps) / (params.max_steps - params.warmup_steps)
    return params.min_lr + (params.max_lr - params.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
