"""pipelib: from web text to an evaluated language model, in reproducible stages."""

import sys

if sys.platform == "win32":
    raise SystemExit(
        "pipelib does not run on Windows itself, which lacks the file locks and signals that it needs; run it in WSL2, the "
        "Linux inside Windows: see docs/how-to/macos-and-wsl.md."
    )
