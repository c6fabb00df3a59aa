"""`pipelib verify`: are the outs what DVC recorded, and the shards what their manifest says?"""

from dataclasses import dataclass
from pathlib import Path

from pipelib.cli.command import Command, option, positional
from pipelib.errors import tell
from pipelib.files import plural

EXAMPLES = """examples:
  pipelib verify                          check every out of dvc.lock that is in the workspace
  pipelib verify data/raw                 check one of them
  pipelib verify --repair && dvc repro    remove what is damaged, DVC's copies too; make it again
"""


@dataclass(frozen=True)
class Verify(Command):
    """Check the outs, and remove what is damaged."""

    command = "verify"
    help = "re-read the data, models and reports, and remove damaged files for good"
    description = (
        "Re-read every file of the outs and compare it with what DVC recorded (MD5). In data/tokens also the manifest, every "
        "shard's header, count, token range and SHA-256, and the token counts. Exit status 1 if anything is wrong; with "
        "--repair 0 once the damage is removed."
    )
    examples = EXAMPLES

    folder: Path | None = positional(
        "an out of dvc.lock, or any folder of shards; default: every out in the workspace", default=None, nargs="?"
    )
    repair: bool = option(
        "remove each damaged file together with DVC's cache object of it, which DVC would restore forever; intact files stay",
        default=False,
    )

    def run(self) -> int:
        """Check, say what is wrong, and remove it if asked; 1 if something is wrong and still there."""
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
            damaged += sum(problem.damaged for problem in report.problems)
            for path in repair(out, report) if self.repair else ():
                print(f"removed {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
        if self.repair and damaged:
            tell("now run dvc repro, which makes again what is missing")
        if self.repair and wrong > damaged:
            tell(f"left to you, since nothing is damaged there: {wrong - damaged} of {wrong} problems", error=True)
        return int(wrong > (damaged if self.repair else 0))
