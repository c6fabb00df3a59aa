"""`pipelib doctor`: is this machine ready for the pipeline, and if not, what to do."""

import argparse
from typing import Any

from pipelib.errors import as_typed

EXAMPLES = """examples:
  pipelib doctor                      one line a check: ok, warn (works, but) or FAIL, with the remedy
"""


def add_parser(subparsers: Any) -> None:
    """Add `doctor` to the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine, with a remedy for whatever is wrong",
        description="Check versions, torch and driver, GPUs, memory, disk, links, DVC, git, vocabulary, locks, compiler, "
        "dvc.lock, metrics, params.yaml, download.path and MLflow's database. Exit status 1 if anything FAILs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print every finding as it is made; 1 if one FAILs."""
    from pipelib.inspection.health import CHECKS, examine

    failed = 0
    for name, check in CHECKS.items():
        for finding in examine(check):
            failed += finding.level == "FAIL"
            print(f"{finding.level:<5}{name:<11}{as_typed(finding.text)}", flush=True)
            if finding.remedy:
                print(f"{'':<16}-> {as_typed(finding.remedy)}", flush=True)
    return int(failed > 0)
