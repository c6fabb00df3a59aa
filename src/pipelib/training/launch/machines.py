"""The machines of a training: how many, where they meet, and how often a training that broke off starts again.

No parameter says so, since results do not hang on it: it comes from the environment. All machines share the checkout and
the state folder. The first one runs the pipeline; the others join with `python -m stages.train --join`.
"""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelib.errors import UserError, tell
from pipelib.processes import natural_int_from_env, positive_int_from_env

SHOWS_UP_SECONDS = 90
"""How long a file that another machine wrote may take to be seen here, over a network file system that caches."""


@dataclass(frozen=True)
class Machines:
    """What torchrun is to be told."""

    count: int
    endpoint: str
    """HOST:PORT of the first machine; empty where it is the only one."""
    local_ranks: int
    """Ranks on each of them."""
    restarts: int
    """How often ranks are started again, from the last checkpoint, after one has died."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.count * self.local_ranks

    def arguments(self, run: str, *, first: bool) -> list[str]:
        """torchrun's arguments on one of the machines.

        Args:
            run: names the training, so that no other one joins it by mistake.
            first: this is the machine of `endpoint`.
        """
        each = [f"--nproc-per-node={self.local_ranks}", f"--max-restarts={self.restarts}"]
        if self.count == 1:
            return ["--standalone", *each]
        meeting = [f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={run}", f"--rdzv-conf=is_host={int(first)}"]
        return [f"--nnodes={self.count}", "--rdzv-backend=c10d", *meeting, *each]

    def wait_for_first(self) -> None:
        """Wait until the first machine is there to be joined, however long it downloads and tokenizes before."""
        host, _, port = self.endpoint.rpartition(":")
        said = False
        while True:
            try:
                with socket.create_connection((host, int(port)), timeout=10):
                    return
            except OSError as error:
                if not said:
                    tell(f"waiting for the training on {self.endpoint} ({error})")
                said = True
            time.sleep(1)


def find_machines() -> Machines:
    """What the environment says.

    Raises:
        UserError: a setting is none, one is missing, or more ranks are asked for than there are GPUs.
    """
    count, endpoint = positive_int_from_env("PIPELIB_NNODES") or 1, os.environ.get("PIPELIB_RDZV_ENDPOINT", "")
    host, _, port = endpoint.rpartition(":")
    if count > 1 and not (host and port.isdecimal()):
        raise UserError(
            f"PIPELIB_NNODES={count} machines need a place to meet, and PIPELIB_RDZV_ENDPOINT={endpoint or '(not set)'} is "
            "none; give HOST:PORT of the first machine, the same on all, for example PIPELIB_RDZV_ENDPOINT=node01:29500."
        )
    return Machines(count, endpoint if count > 1 else "", process_count(), natural_int_from_env("PIPELIB_MAX_RESTARTS"))


def process_count() -> int:
    """Ranks to start on this machine: `$PIPELIB_NPROC`, else one a GPU, else one.

    Raises:
        UserError: `PIPELIB_NPROC` is no number, or asks for more ranks than there are GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wish = positive_int_from_env("PIPELIB_NPROC")
    if wish is not None and gpus and wish > gpus:
        raise UserError(
            f"PIPELIB_NPROC={wish} is more than the {gpus} GPU(s) here, and ranks cannot share one; lower it, or unset it."
        )
    return wish or max(1, gpus)


def wait_for_file(path: Path) -> None:
    """Wait a while for a file that a rank, on this machine or another, has written."""
    deadline = time.monotonic() + SHOWS_UP_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
