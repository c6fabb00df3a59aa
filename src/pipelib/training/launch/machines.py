"""The machines of a training: how many there are, where they meet, and how often the ranks restart after a crash.

Environment variables set this, not parameters, because results do not depend on it. All machines share the checkout and the
state folder. The first machine runs the pipeline; the others join with `python -m stages.train --join`.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelib.errors import UserError, tell
from pipelib.model.device import DEVICE, gpu_count, unused_gpu
from pipelib.processes import natural_int_from_env, positive_int_from_env

FILE_WAIT_SECONDS = 90
"""How long a file written on another machine may take to appear here: network file systems cache."""


@dataclass(frozen=True)
class Machines:
    """What torchrun must know."""

    count: int
    endpoint: str
    """HOST:PORT of the first machine; empty if it is the only one."""
    local_ranks: int
    """Ranks on each machine."""
    restarts: int
    """How often the ranks are restarted, from the last checkpoint, after one has died."""

    @property
    def world_size(self) -> int:
        """The total number of ranks."""
        return self.count * self.local_ranks

    def arguments(self, run: str, *, first: bool) -> list[str]:
        """torchrun's arguments on one of the machines.

        Args:
            run: the training's name, so that no other training joins it by mistake.
            first: whether this is the machine of `endpoint`.
        """
        each = [f"--nproc-per-node={self.local_ranks}", f"--max-restarts={self.restarts}"]
        if self.count == 1:
            return ["--standalone", *each]
        # Without `is_host`, torchrun guesses from host names which machine serves the rendezvous.
        meeting = [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={run}", f"--rdzv-conf=is_host={int(first)}"]
        return [f"--nnodes={self.count}", "--rdzv-backend=c10d", *meeting, *each]

    def wait_for_first(self) -> None:
        """Wait until the first machine can be joined, however long it downloads and tokenizes first."""
        host, _, port = self.endpoint.rpartition(":")
        told = False
        while True:
            try:
                with socket.create_connection((host, int(port)), timeout=10):
                    return
            except OSError as error:
                if not told:
                    tell(f"waiting for the training on {self.endpoint} ({error})")
                told = True
            time.sleep(1)


def find_machines() -> Machines:
    """Read the machines from the environment variables.

    Raises:
        UserError: a setting is invalid or missing, or asks for more ranks than there are GPUs.
    """
    count, endpoint = positive_int_from_env("PIPELIB_NNODES") or 1, os.environ.get("PIPELIB_RDZV_ENDPOINT", "")
    host, _, port = endpoint.rpartition(":")
    if count > 1 and not (host and port.isdecimal()):
        raise UserError(
            f"PIPELIB_NNODES={count} machines need PIPELIB_RDZV_ENDPOINT=HOST:PORT to connect, and it is "
            f"{endpoint or '(not set)'}; set it to the address of the first machine, the same value on every machine, for "
            "example PIPELIB_RDZV_ENDPOINT=node01:29500."
        )
    return Machines(count, endpoint if count > 1 else "", process_count(), natural_int_from_env("PIPELIB_MAX_RESTARTS"))


def process_count() -> int:
    """How many ranks to start on this machine: `$PIPELIB_NPROC`, else one per GPU, else one.

    Raises:
        UserError: `PIPELIB_NPROC` is not a number, or asks for more ranks than there are GPUs.
    """
    gpus = gpu_count()
    requested = positive_int_from_env("PIPELIB_NPROC")
    if requested is not None and gpus and requested > gpus:
        raise UserError(
            f"PIPELIB_NPROC={requested} is more than the {gpus} GPU(s) here, and ranks cannot share one; lower it, or unset it."
        )
    return requested or max(1, gpus)


def require_gpu(precision: str) -> None:
    """Refuse to train for a GPU on the CPU, where torch cannot use the GPU that is here, for example with an old driver.

    Raises:
        UserError: `precision` is one for GPUs; with fp32 only a warning is printed.
    """
    if not unused_gpu():
        return
    problem = f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it"
    remedy = f"run pipelib doctor, which says why; {DEVICE}=cpu trains on the CPU on purpose"
    if precision != "fp32":
        raise UserError(f"{problem}, so training with precision {precision} would be very slow on the CPU; {remedy}.")
    tell(f"warning: {problem}, so the model trains on the CPU; {remedy}", error=True)


def wait_for_file(path: Path) -> bool:
    """Wait for a file that a rank has written, maybe on another machine. Return after `FILE_WAIT_SECONDS` whether it is there."""
    deadline = time.monotonic() + FILE_WAIT_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    return path.exists()
