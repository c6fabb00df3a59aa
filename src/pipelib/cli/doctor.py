"""`pipelib doctor`: is this machine ready for the pipeline, and if not, what to do."""

from dataclasses import dataclass

from pipelib.cli.command import Command
from pipelib.errors import tell

EXAMPLES = """examples:
  pipelib doctor                      a line for each check: ok, warn or FAIL, and the remedy
"""


@dataclass(frozen=True)
class Doctor(Command):
    """Examine this machine."""

    command = "doctor"
    help = "check this machine, with a remedy for whatever is wrong"
    description = (
        "Check versions, torch and driver, GPUs, memory, disk, links, DVC, git, vocabulary, locks, compiler, dvc.lock, metrics, "
        "params.yaml, download.path and MLflow's database. Exit status 1 if anything FAILs."
    )
    examples = EXAMPLES

    def run(self) -> int:
        """Print every finding as it is made; 1 if one FAILs."""
        from pipelib.inspection.health import CHECKS, examine

        failed = 0
        for name, check in CHECKS.items():
            for finding in examine(check):
                failed += finding.level == "FAIL"
                tell(f"{finding.level:<5}{name:<11}{finding.text}")
                if finding.remedy:
                    tell(f"{'':<16}-> {finding.remedy}")
        return int(failed > 0)
