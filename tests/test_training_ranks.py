"""Several ranks train as one does, in this machine's processes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_params import MUON, train_params
from small_project import CHECKOUT
from small_run import ALONE
from warm_python import run_python

from pipelib.files import plural
from pipelib.tokens.shards import read_manifest
from pipelib.training.batches import make_loader

RANKS = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
from small_params import model_params, train_params
from pipelib.errors import UserError, user_message
from pipelib.model.families.gpt2 import GPT2
from pipelib.tokens.shards import read_manifest
from pipelib.tracking.run import NullRun
from pipelib.training.launch.distributed import World
from pipelib.training.hardware import Peak
from pipelib.training.build import build_trainer
from pipelib.training.objectives import NextToken
from pipelib.training.pretraining import Pretraining
from pipelib.training.schedule import Cadence
from pipelib.training.training_log import MainLog, NullLog

folder, world_size, options = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
poisoned_rank, poisoned_call, checkpoint_every = (options.pop(name) for name in ("rank", "call", "checkpoint_every"))
params, calls, forward = train_params(**options), 0, NextToken.forward
torch.set_num_threads(1)

def poison(self, inputs, targets, *more):
    global calls
    calls += 1
    return forward(self, inputs, targets) * (float("nan") if calls == poisoned_call else 1.0)

def run(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    log = MainLog(folder, NullRun(), params, 1, lambda: Peak(1e12, "")) if rank == 0 else NullLog()
    cadence, tokens = Cadence(10**6, checkpoint_every), folder / "tokens"
    world = World(rank, world_size, torch.device("cpu"))
    if rank == poisoned_rank:
        NextToken.forward = poison
    try:
        build_trainer(Pretraining(model_params(), tokens, read_manifest(tokens)), params, cadence, folder, world, log).run()
    except UserError as error:
        print(f"rank {rank}: {error}", flush=True)
    dist.destroy_process_group()

children = []
for rank in reversed(range(world_size)):
    if rank and (child := os.fork()):
        children.append(child)
        continue
    run(rank)
    if rank:
        os._exit(0)
sys.exit(max((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), default=0))
"""


def train_ranks(
    folder: Path, world_size: int, *, checkpoint_every: int = 15, rank: int = -1, call: int = -1, **changes: Any
) -> str:
    """Train with several ranks on `folder/tokens` and in `folder`, and what they print.

    Args:
        rank: one whose loss is not a number
        call: at its call of the model of this number; the first one is `World.warm_up`'s.
    """
    options = {"rank": rank, "call": call, "checkpoint_every": checkpoint_every, "micro_batch_size": 1, **changes}
    sources = [str(CHECKOUT / "src"), str(CHECKOUT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sources), "CUDA_VISIBLE_DEVICES": ""}
    (folder / "meeting").unlink(missing_ok=True)
    return run_python("-c", RANKS, folder, str(world_size), json.dumps(options), env=environment, check=True).stdout


def table(folder: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """train.csv of `train_ranks`: a row a step."""
    return np.loadtxt(folder / "train.csv", delimiter=",", skiprows=1)


def test_losses_and_norms_depend_neither_on_the_ranks_nor_on_the_micro_batches(folder: Path) -> None:
    tables = []
    for world_size, micro_batch_size in ((1, 4), (1, 1), (2, 1), (4, 1)):
        train_ranks(folder, world_size, max_tokens=1280, micro_batch_size=micro_batch_size)
        tables.append(table(folder))
        shutil.rmtree(folder / "checkpoints")
    assert tables[0].shape == (20, 5)
    assert tables[0][0, 2] - tables[0][-1, 2] > 0.5  # it did learn
    for other in tables[1:]:
        assert np.allclose(other, tables[0], rtol=1e-5, atol=0)


def test_muon_is_the_same_for_any_ranks_up_to_rounding(folder: Path) -> None:
    """It amplifies the smallest parts of a gradient, so sums of another order show more than with AdamW."""
    losses = []
    for world_size in (1, 2, 4):
        train_ranks(folder, world_size, max_tokens=1280, optimizer="muon", muon=MUON, max_lr=0.02)
        losses.append(table(folder)[:, 2])
        shutil.rmtree(folder / "checkpoints")
    for other in losses[1:]:
        assert np.allclose(other[:2], losses[0][:2], rtol=1e-5, atol=0)  # the second one has seen one update
        assert np.allclose(other, losses[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(4, 2, marks=pytest.mark.long)])
def test_another_number_of_ranks_goes_on_and_says_what_is_not_exact(folder: Path, before: int, after: int) -> None:
    assert "bit-identical" not in train_ranks(folder, before, max_tokens=1280)
    whole = table(folder)
    shutil.rmtree(folder / "checkpoints/step_00000020")
    said = train_ranks(folder, after, max_tokens=1280)
    assert f"had {plural(before, 'rank')} and resumes with {after}: each step has the same batch" in said
    assert "not bit-identical" in said
    assert "training resumes after step 15" in said
    resumed = table(folder)
    assert np.array_equal(resumed[:15], whole[:15])
    assert np.allclose(resumed, whole, rtol=1e-5, atol=0)


def test_a_resumed_training_of_four_ranks_equals_an_uninterrupted_one_bit_for_bit(folder: Path) -> None:
    # DDP sums in other groups after its first step, and three ranks or more then round otherwise; two never do.
    last = folder / "checkpoints/step_00000020"
    weights = []
    for _ in range(2):
        train_ranks(folder, 4, max_tokens=1280)
        weights.append(torch.load(last / "state.pt", weights_only=True)["model"])
        shutil.rmtree(last)  # so that the second one goes on from step 15
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []


def test_a_rank_whose_loss_is_not_finite_is_named_by_every_rank(folder: Path) -> None:
    said = train_ranks(folder, 2, rank=1, call=1 + 2 * 3, checkpoint_every=2)  # 2 micro-steps a step
    _, plan = make_loader(train_params(), folder / "tokens", read_manifest(folder / "tokens"), ALONE)
    rows = ", ".join(map(str, plan.rows(2)[1::2]))
    for rank in (0, 1):
        assert f"rank {rank}: step 3 has loss nan on rank 1 and gradient norm nan" in said
    assert (
        said.count(f"its batch was rows {rows} on rank 1. The last checkpoint is {folder}/checkpoints/step_00000002")
        == 2
    )
