"""What a step with Muon costs beside one with AdamW, and what its matrices cost by arithmetic in a larger training.

    python bench/optimizers.py                                       the model of params.yaml, the two in turns
    python bench/optimizers.py --arithmetic presets/modern-124m.yaml     FLOPs of the matrices by those of the whole step

The first one measures whole steps: forward, backward, clipping, update. The second one counts, and measures each shape of matrix
once on this machine.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipelib.model.decoder import build
from pipelib.params import Params, load_params
from pipelib.training.batches import tensors
from pipelib.training.launch.distributed import World
from pipelib.training.objectives import NextToken
from pipelib.training.optim.muon import STEPS, orthogonalised
from pipelib.training.optimizer import make_optimizer
from pipelib.training.params import MuonParams
from pipelib.training.roles import MATRICES, roles_of
from pipelib.training.step import take_step
from pipelib.vocabulary.planned import planned_size
from pipelib.workspace.places import HERE

MUON = MuonParams(momentum=0.95, weight_decay=0.0, embedding_lr=0.01, head_lr=0.01, vector_lr=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=HERE.params, help="default: params.yaml")
    parser.add_argument("--rounds", type=int, default=60, help="steps of each; default: 60")
    parser.add_argument("--arithmetic", type=Path, help="count for this parameter file instead")
    arguments = parser.parse_args()
    if arguments.arithmetic:
        count(load_params(arguments.arithmetic))
    else:
        compare(load_params(arguments.params), arguments.rounds)


def compare(params: Params, rounds: int) -> None:
    """Steps of both optimizers in turns, on one batch of random tokens."""
    size, world = planned_size(params.vocabulary), World(0, 1, torch.device("cpu"))
    tokens = np.random.default_rng(0).integers(0, size, (params.train.rows_per_step, params.train.sequence_length + 1))
    batches = [tensors((tokens[:, :-1], tokens[:, 1:]), world.device)]
    seconds: dict[str, list[float]] = {"adamw": [], "muon": []}
    steps = {}
    for name in seconds:
        train = replace(params.train, optimizer=name, muon=MUON if name == "muon" else None)
        model = build(params.model, size)
        model.initialise(1)
        steps[name] = NextToken(model), make_optimizer(model, train), train
    for turn in range(rounds + 5):
        for name, (objective, optimizer, train) in steps.items():
            began = time.perf_counter()
            take_step(objective, objective, optimizer, batches, 1e-4, train, world)
            if turn >= 5:
                seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        print(f"{name:<8}{1e3 * middle:8.1f} ms a step ({1e3 * low:.1f} to {1e3 * high:.1f})")
    ratios = [two / one for one, two in zip(seconds["adamw"], seconds["muon"], strict=True)]
    print(f"muon by adamw: {statistics.median(ratios):.3f}, the median of {rounds} pairs")


def count(params: Params) -> None:
    """FLOPs of the matrices by those of the step, and the seconds of each shape here."""
    model = build(params.model, planned_size(params.vocabulary))
    shapes: dict[tuple[int, int], int] = {}
    for parameter in roles_of(model)[MATRICES].values():
        rows, columns = sorted(parameter.shape)
        shapes[rows, columns] = shapes.get((rows, columns), 0) + 1
    # Five times: the Gram matrix, its square, and the product with the matrix.
    flops = {
        (rows, columns): STEPS * (4 * rows**2 * columns + 2 * rows**3) * number
        for (rows, columns), number in shapes.items()
    }
    step = params.model.flops_per_token(model.vocab_size, params.train.sequence_length)
    step *= params.train.global_batch_tokens
    for (rows, columns), number in shapes.items():
        matrix = torch.randn(1, rows, columns)
        orthogonalised(matrix)
        began = time.perf_counter()
        orthogonalised(matrix)
        measured = time.perf_counter() - began
        once = flops[rows, columns] / number
        print(
            f"{number:>4} of {rows} x {columns}: {once / 1e9:.1f} GFLOP each, {measured * 1e3:.0f} ms here, "
            f"{once / measured / 1e9:.0f} GFLOP/s"
        )
    total = sum(flops.values())
    print(
        f"all {total / 1e12:.2f} TFLOP, a step of {params.train.global_batch_tokens:,} tokens {step / 1e12:.0f} TFLOP: "
        f"1 + {total / step:.4f}"
    )


if __name__ == "__main__":
    main()
