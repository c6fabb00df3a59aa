"""torchrun on a thread of the launcher: it starts the ranks, each a process, and watches them.

In a process of its own it would import torch once more, for two seconds in which no rank starts. On a thread, because it may
wait long for other machines, and Python acts on a signal in the main thread only, between two waits.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread

from pipelib.errors import UserError


def start_torchrun(arguments: Sequence[str]) -> Future[int]:
    """Run torchrun with these arguments; the future has 0, or the exit status of a rank that failed, once all have ended.

    The ranks are to be tied to this process (`die_with_parent`), by which they end with it, however it does.

    Raises:
        UserError: through the future: the machines did not find each other.
    """
    os.environ["PIPELIB_PARENT"] = str(os.getpid())  # ranks import torch for seconds before they are tied
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks set their own number; this only keeps torchrun quiet
    # What goes wrong in a rank is said by the rank, once; torchrun's own account of it is only longer.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    status: Future[int] = Future()
    Thread(target=_run, args=(list(arguments), status), name="torchrun", daemon=True).start()
    return status


def _run(arguments: list[str], status: Future[int]) -> None:
    try:
        status.set_result(_torchrun(arguments))
    except BaseException as error:
        status.set_exception(error)


def _torchrun(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except RendezvousError as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"the machines of this training did not find each other ({reason}), so it stopped; compare PIPELIB_NNODES and "
            "PIPELIB_RDZV_ENDPOINT on all of them, and start those that are missing with python -m stages.train --join."
        ) from error
    return 0
