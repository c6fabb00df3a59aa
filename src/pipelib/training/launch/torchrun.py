"""torchrun on a thread of the launcher: it starts each rank as a process and watches them.

A separate process would have to import torch again, and the ranks would start two seconds later. It runs on a thread because
it may wait long for other machines, and Python handles signals only on the main thread, between two waits.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread

from pipelib.errors import UserError


def start_torchrun(arguments: Sequence[str]) -> Future[int]:
    """Run torchrun with these arguments. When all ranks have ended, the future holds 0 or the exit status of a failed rank.

    Ranks must call `die_with_parent`, so that they die with this process.

    Raises:
        UserError: through the future: the machines did not find each other, or the first one was lost.
    """
    os.environ["PIPELIB_PARENT"] = str(
        os.getpid()
    )  # this process may die while ranks still import torch, before the tie
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks set their own number; this only keeps torchrun from warning
    # A rank that fails prints why, once. torchrun would only add a longer report.
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
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    except (RendezvousConnectionError, DistError) as error:
        raise UserError(
            f"the connection to another machine was lost ({str(error).splitlines()[0]}), so the training ended here too; the "
            "last checkpoint is kept, and the same commands on all machines resume from it."
        ) from None
    except RendezvousError as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"the machines of this training did not find each other ({reason}), so it stopped; compare PIPELIB_NNODES and "
            "PIPELIB_RDZV_ENDPOINT on all of them, and start missing machines with python -m stages.train --join."
        ) from error
    return 0
