"""`pipelib verify`: are the shards what the manifest says?"""

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  pipelib verify                              check data/tokens
  pipelib verify --repair && dvc repro        remove what is damaged, with DVC's copies of it, and make it again
"""


def add_parser(subparsers: Any) -> None:
    """Add `verify` to the command."""
    parser = subparsers.add_parser(
        "verify",
        help="re-check every token shard, and remove damaged ones for good",
        description="Re-check the manifest, every shard's header, count, token range and SHA-256, the token counts, and that "
        "nothing else lies there. Exit status 1 if anything is wrong; with --repair 0 once the damage is removed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/tokens"), help="default: data/tokens")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove each damaged file together with DVC's cache object of it, which DVC would restore for ever",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check, say what is wrong, and remove it if asked; 1 if something is wrong and still there."""
    from pipelib.tokens.repair import check_folder, repair

    report = check_folder(arguments.folder)
    if not report.problems:
        print(f"{arguments.folder}: all {len(report.good)} shards, the manifest and the counts are good")
        return 0
    count = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
    print(f"{arguments.folder} has {count}:", file=sys.stderr)
    for problem in report.problems:
        print(f"  - {problem.text}", file=sys.stderr)
    if not arguments.repair:
        return 1
    for path in repair(arguments.folder, report):
        print(f"removed {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    print("now run dvc repro, which makes again what is missing")
    return 0
