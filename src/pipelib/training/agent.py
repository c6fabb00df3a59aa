"""torchrun, tied to the launcher that started it: `python -m pipelib.training.agent TORCHRUN-ARGUMENTS`.

When the launcher dies, the kernel kills this process, and the ranks, which are tied to it in turn. Asked to stop, this
process passes that on and waits for the ranks to end; torchrun itself would give them 30 s.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from pipelib.processes import tie_to_parent
from pipelib.training.stopping import ask_to_stop

if __name__ == "__main__":
    tie_to_parent(signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: ask_to_stop(Path(sys.argv[-1]), number))
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"  # torchrun's option --signals-to-handle
    os.environ["PIPELIB_PARENT"] = str(os.getpid())  # ranks import torch for seconds before they are tied
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # What went wrong in a rank is said by the rank, once; torchrun's own account of it is only longer.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main()
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except ChildFailedError as error:
        sys.exit(max(1, *(failure.exitcode for failure in error.failures.values())))
