"""`pipelib verify`: check the outs against dvc.lock, and the shards against their manifest."""

from dataclasses import dataclass
from pathlib import Path

from pipelib.cli.command import Command, option, positional
from pipelib.errors import tell
from pipelib.files import plural

EXAMPLES = """examples:
  pipelib verify                          check every out of dvc.lock that is in the workspace
  pipelib verify data/raw                 check one of them
  pipelib verify --repair && dvc repro    remove damaged files and DVC's copies, then make them again
"""


@dataclass(frozen=True)
class Verify(Command):
    """Check the outs, and remove what is damaged."""

    command = "verify"
    help = "find damaged data, models and reports, and remove them for good"
    description = (
        "Read every file of the outs and compare it with what DVC recorded (MD5). In data/tokens, also check the manifest, the "
        "header, length, token range and SHA-256 of every shard, and the token counts. Exit status 1 if anything is wrong; with "
        "--repair, 0 once the damage is removed."
    )
    examples = EXAMPLES

    folder: Path | None = positional(
        "an out of dvc.lock, or any folder of shards; default: all outs in the workspace", default=None, nargs="?"
    )
    repair: bool = option(
        "delete each damaged file and its copy in DVC's cache (otherwise DVC restores the damage); intact files stay",
        default=False,
    )

    def run(self) -> int:
        """Check, report, and repair if asked; return 1 if something is still wrong."""
        from pipelib.inspection.verify import check_folder, find_folders, repair

        wrong = damaged = 0
        for folder, out in find_folders(self.folder).items():
            report = check_folder(folder, out)
            if not report.problems:
                tell(f"{folder}: good; the hashes of {len(report.good)} files are right")
                continue
            tell(f"{folder} has {plural(len(report.problems), 'problem')}:", error=True)
            for problem in report.problems:
                tell(f"  - {problem.text}", error=True)
            wrong += len(report.problems)
            # only damage can be repaired; the other problems are for the user to decide
            damaged += sum(problem.damaged for problem in report.problems)
            for path in repair(out, report) if self.repair else ():
                print(f"removed {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
        if self.repair and damaged:
            tell("now run dvc repro, to make the removed files again")
        if self.repair and wrong > damaged:
            left = f"not repaired: {wrong - damaged} of {wrong} problems, because nothing is damaged there"
            tell(f"{left}; do what their lines say", error=True)
        return int(wrong > (damaged if self.repair else 0))
