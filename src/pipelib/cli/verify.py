"""`pipelib verify`: are the outs what DVC recorded, and the shards what their manifest says?"""

import argparse
import sys
from pathlib import Path
from typing import Any

from pipelib.errors import as_typed

EXAMPLES = """examples:
  pipelib verify                              check every out of dvc.lock that is here
  pipelib verify data/raw                     check one of them
  pipelib verify --repair && dvc repro        remove what is damaged, with DVC's copies of it, and make it again
"""


def add_parser(subparsers: Any) -> None:
    """Add `verify` to the command."""
    parser = subparsers.add_parser(
        "verify",
        help="re-read the data, models and reports, and remove damaged files for good",
        description="Re-read every file of the outs and compare it with what DVC recorded (MD5). In data/tokens also the "
        "manifest, every shard's header, count, token range and SHA-256, and the token counts. Exit status 1 if anything is "
        "wrong; with --repair 0 once the damage is removed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        help="an out of dvc.lock, or any folder of shards; default: every out that is here",
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove each damaged file together with DVC's cache object of it, which DVC would restore for ever; files that "
        "are whole stay",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, say what is wrong, and remove it if asked; 1 if something is wrong and still there."""
    from pipelib.inspection.verify import check_folder, find_folders, repair

    wrong = damaged = 0
    for folder, out in find_folders(arguments.folder).items():
        report = check_folder(folder, out)
        if not report.problems:
            print(f"{folder}: good; the hashes of {len(report.good)} files are right")
            continue
        count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        print(f"{folder} has {count}:", file=sys.stderr)
        for problem in report.problems:
            print(f"  - {as_typed(problem.text)}", file=sys.stderr)
        wrong += len(report.problems)
        damaged += sum(problem.damaged for problem in report.problems)
        for path in repair(out, report) if arguments.repair else ():
            print(f"removed {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    if arguments.repair and damaged:
        print(as_typed("now run dvc repro, which makes again what is missing"))
    if arguments.repair and wrong > damaged:
        print(f"left to you, since nothing is damaged there: {wrong - damaged} of {wrong} problems", file=sys.stderr)
    return int(wrong > (damaged if arguments.repair else 0))
