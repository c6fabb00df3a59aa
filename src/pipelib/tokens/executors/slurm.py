"""Encode in an array of Slurm's jobs, which share the checkout and the state folder with this machine.

Each of `$PIPELIB_SLURM_JOBS` jobs (4) encodes a share of the units, as `python -m stages.tokenize --share i/n` does by hand, with
`$PIPELIB_SLURM_CPUS` CPUs (8). What Slurm has to know besides it takes from its own variables, such as `SBATCH_PARTITION`,
`SBATCH_ACCOUNT` and `SBATCH_TIMELIMIT`. A job that dies leaves its finished units; for the others a new array is submitted, twice
at most. A machine with other code or packages puts its units elsewhere, so they are never mixed.
"""

import getpass
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelib.errors import UserError, tell
from pipelib.files import plural, sha256_json
from pipelib.processes import positive_int_from_env
from pipelib.tokens.encoding import EXECUTOR, Encoding
from pipelib.tokens.unit_file import read_counts
from pipelib.tokens.units import DoneUnit, Seconds
from pipelib.workspace.places import StatePlaces

JOBS, CPUS = 4, 8
"""The default number of jobs, and the CPUs of each."""
ROUNDS = 3
"""How often an array is submitted for what is still missing."""
POLL_SECONDS, CANCEL_SECONDS = 2.0, 120.0
"""The time between two looks, and the time that jobs have to end after they were cancelled."""
FILE_WAIT_SECONDS = 90.0
"""How long a file of another machine may take to appear here: network file systems cache."""
ENDED = "the share ended with status"
RETRIED = ("a worker was killed", "is in use by process")
"""Messages of a job whose cause may be gone when its units are tried again."""


def encode(task: Encoding) -> Generator[DoneUnit]:
    """See `Executor`.

    Raises:
        UserError: Slurm is not there, a unit cannot be encoded, or jobs keep dying.
    """
    if not task.units:
        return
    if not shutil.which("sbatch"):
        raise UserError(
            f"{EXECUTOR}=slurm found no `sbatch`, so no job was submitted; start the stage on a machine from which jobs are "
            f"submitted, or unset {EXECUTOR}."
        )
    missing = {unit.file(task.store): unit for unit in task.units}
    # The name of this store's jobs: those of a run that was killed have it too.
    name = f"pipelib-{sha256_json(str(task.store.absolute()))[:12]}"
    logs = StatePlaces.chosen().slurm.absolute() / name
    logs.mkdir(parents=True, exist_ok=True)
    for number in range(1, ROUNDS + 1):
        _end_jobs(name)
        with _array(name, logs) as job:
            ended_at = float("inf")
            while missing:
                if ended_at == float("inf") and _has_ended(job):
                    ended_at = time.monotonic()
                for path, unit in list(missing.items()):
                    if (counts := read_counts(path)) is not None:  # every byte is compared before a shard takes it
                        del missing[path]
                        yield DoneUnit(path, unit.identity, counts, Seconds())
                waited = time.monotonic() - ended_at
                if waited >= (FILE_WAIT_SECONDS if _all_well(logs) else 0):
                    break
                if missing:
                    time.sleep(POLL_SECONDS)
        if not missing:
            return
        _raise_what_jobs_say(logs)
        tell(
            f"tokenize: the jobs of round {number} have ended, and {plural(len(missing), 'unit')} are missing",
            error=True,
        )
    raise UserError(
        f"{plural(len(missing), 'unit')} are still missing after jobs were submitted {ROUNDS} times, so this stage is not "
        f"complete; look at the logs in {logs}: a machine may have failed, or have other code or packages. Then run dvc repro "
        "again: it encodes only what is missing."
    )


@contextmanager
def _array(name: str, logs: Path) -> Iterator[str]:
    """Submit the jobs, and give the number of their array. What is left of them at the end is cancelled."""
    jobs, cpus = (
        positive_int_from_env("PIPELIB_SLURM_JOBS") or JOBS,
        positive_int_from_env("PIPELIB_SLURM_CPUS") or CPUS,
    )
    for log in logs.glob("share-*.log"):
        log.unlink()
    share = f"{shlex.quote(sys.executable)} -m stages.tokenize --share $SLURM_ARRAY_TASK_ID/{jobs}"
    # Variables go by the environment and not by --export=NAME=VALUE, where a comma would end a value.
    environment = {**os.environ, EXECUTOR: "local", "PIPELIB_WORKERS": str(cpus)}
    environment.pop("PIPELIB_PARENT", None)  # the stage ends with that process, and it is on another machine
    done = subprocess.run(
        [
            "sbatch", "--parsable", f"--job-name={name}", f"--array=0-{jobs - 1}", f"--cpus-per-task={cpus}",
            f"--chdir={Path.cwd()}", f"--output={logs}/share-%a.log", "--export=ALL",
            f'--wrap={share}; status=$?; echo "{ENDED} $status"; exit $status',
        ],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    if done.returncode:
        raise UserError(
            f"`sbatch` did not submit the jobs ({done.stderr.strip()}), so nothing was encoded; Slurm reads SBATCH_PARTITION, "
            "SBATCH_ACCOUNT and SBATCH_TIMELIMIT, and PIPELIB_SLURM_CPUS says the CPUs of a job."
        )
    job = done.stdout.strip().partition(";")[0]  # a cluster's name may follow
    try:
        yield job
    finally:
        subprocess.run(["scancel", job], capture_output=True, check=False)


def _end_jobs(name: str) -> None:
    """Cancel the jobs that a killed run has left, and wait until they have ended: they hold the locks of their shares.

    Raises:
        UserError: they do not end.
    """
    mine = [f"--name={name}", f"--user={getpass.getuser()}"]
    deadline = time.monotonic() + CANCEL_SECONDS
    while subprocess.run(["squeue", "--noheader", *mine], capture_output=True, text=True, check=False).stdout.strip():
        subprocess.run(["scancel", *mine], capture_output=True, check=False)
        if time.monotonic() > deadline:
            raise UserError(
                f"jobs {name} of an earlier run do not end, and would encode the same units; end them: scancel --name={name}"
            )
        time.sleep(POLL_SECONDS)


def _has_ended(job: str) -> bool:
    done = subprocess.run(["squeue", "--noheader", f"--jobs={job}"], capture_output=True, text=True, check=False)
    # Slurm forgets jobs after some minutes. Another error says nothing: its server may be busy.
    return not done.stdout.strip() if not done.returncode else "Invalid job id" in done.stderr


def _last_lines(logs: Path) -> list[tuple[str, list[str]]]:
    """The last line of each log, and the lines before it. A job that was killed may have said nothing."""
    texts = [log.read_text(encoding="utf-8", errors="replace").splitlines() for log in sorted(logs.glob("share-*.log"))]
    return [(lines[-1], lines[:-1]) if lines else ("", []) for lines in texts]


def _all_well(logs: Path) -> bool:
    """Whether every job says that its share is complete; then files that are missing are only not visible yet."""
    return bool(lines := _last_lines(logs)) and all(last == f"{ENDED} 0" for last, _ in lines)


def _raise_what_jobs_say(logs: Path) -> None:
    """Raise what a job has refused, since another job would refuse it too. A job that was stopped has another status.

    Raises:
        UserError: a share ended with an error that the user can fix.
    """
    for last, lines in _last_lines(logs):
        said = [line for line in lines if line.startswith("tokenize: ")]
        if last == f"{ENDED} 1" and said and not any(words in said[-1] for words in RETRIED):
            raise UserError(said[-1].removeprefix("tokenize: "))
