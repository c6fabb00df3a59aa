"""The stages of the pipeline. Run each as `python -m stages.NAME`, from the root of its checkout.

DVC runs a queued or temporary experiment in a copy of the repository, but an editable install points at the original.
So this package puts the `src` of its own checkout first on Python's path, for itself and for every process it starts.
It stops if Python imported `pipelib` from anywhere else. A stage dies when the DVC process that started it dies.
"""

import os
import sys
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parents[1]
SOURCE = ROOT / "src"

sys.path.insert(0, str(SOURCE))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))

import pipelib  # noqa: E402  (after the path was set, so that it comes from this checkout)

if Path(os.path.abspath(pipelib.__file__)).parent != SOURCE / "pipelib":
    raise SystemExit(
        f"pipelib was imported from {pipelib.__file__}, not from {SOURCE}, so the stage would run other code; "
        "start it as `python -m stages.NAME` in a new process."
    )

from pipelib.processes import die_on_signals, die_with_parent  # noqa: E402

# Do both before the slow imports, so that a stage can also be stopped while it imports.
if sys.argv[0] == "-m":  # argv[0] while Python looks for the module of `python -m stages.NAME`
    die_on_signals()
die_with_parent()
