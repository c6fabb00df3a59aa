"""The four stages of the pipeline. Each runs as `python -m stages.NAME`, from the root of its checkout.

A queued or temporary experiment of DVC runs in a copy of the repository, while an editable install points at the
original. So this package puts its own checkout's `src` first, for itself and for every process it starts, and refuses
to go on if Python took `pipelib` from anywhere else. A stage ends when the DVC that started it does.
"""

import os
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parents[1]
SOURCE = ROOT / "src"

sys.path.insert(0, str(SOURCE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))

import pipelib  # noqa: E402  (only now does Python look in this checkout)

if Path(os.path.abspath(pipelib.__file__)).parent != SOURCE / "pipelib":
    raise SystemExit(
        f"pipelib was imported from {pipelib.__file__} and not from {SOURCE}, so the result would be another code's; "
        "start the stage as `python -m stages.NAME` in a fresh process."
    )

from pipelib.processes import die_of_signals, tie_to_parent  # noqa: E402

# Both before anything is imported that takes seconds.
if sys.argv[0] == "-m":  # what Python says while it looks for the module of `python -m stages.NAME`
    die_of_signals()
tie_to_parent()
