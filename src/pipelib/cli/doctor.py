"""`pipelib doctor`: check whether this machine is ready for the pipeline, and say how to fix it."""

from dataclasses import dataclass

from pipelib.cli.command import Command
from pipelib.errors import tell

EXAMPLES = """examples:
  pipelib doctor                      one line per check: ok, warn or FAIL, and the remedy
"""


@dataclass(frozen=True)
class Doctor(Command):
    """Check this machine."""

    command = "doctor"
    help = "check this machine, and say how to fix what is wrong"
    description = (
        "Check versions, torch and driver, GPUs, memory, disk, links, DVC, git, vocabulary, locks, compiler, dvc.lock, metrics, "
        "params.yaml, download.path, finetune.path and MLflow's database. Exit status 1 if any check FAILs."
    )
    examples = EXAMPLES

    def run(self) -> int:
        """Print each finding as soon as it is known; return 1 if one FAILs."""
        from pipelib.inspection.health import CHECKS, examine

        failed = 0
        for name, check in CHECKS.items():
            for finding in examine(check):
                failed += finding.level == "FAIL"
                tell(f"{finding.level:<5}{name:<11}{finding.text}")
                if finding.remedy:
                    tell(f"{'':<16}-> {finding.remedy}")
        return int(failed > 0)
