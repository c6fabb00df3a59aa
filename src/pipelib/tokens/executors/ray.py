"""Encode on a cluster of Ray, whose machines need no shared file system: text goes out and files of units come back.

Start the cluster first (`ray start`), and install `pip install '.[ray]'` on every machine; the code travels along. This machine
reads the text. A task has one unit, about 32 MB of text, and one CPU; a third more tasks are out than there are CPUs, at most as
many as a quarter of this machine's object store holds. Ray gives the tasks of a lost machine to others.
"""

import atexit
import logging
import os
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pipelib
from pipelib.errors import UserError
from pipelib.files import format_bytes, write_atomic
from pipelib.tokens.encoding import Encoding, package_versions, require_same_packages
from pipelib.tokens.unit_file import UnitCounts
from pipelib.tokens.units import UNIT_BYTES, DoneUnit, Seconds, Unit, encode_texts, read_unit
from pipelib.vocabulary.choice import published_tokenizer
from pipelib.vocabulary.engines import Engine, Texts, load_engine
from pipelib.vocabulary.folder import read_tokenizer
from pipelib.workspace.places import HERE

RETRIES = 10
"""How often a unit is given to another worker whose first one died. Endless would hide a text that kills every worker."""

Content = tuple[bytes, UnitCounts, Seconds]
"""The file of a unit, with its counts and the time it took."""


def encode(task: Encoding) -> Generator[DoneUnit]:
    """See `Executor`.

    Raises:
        UserError: Ray or its cluster cannot be used, or a unit cannot be encoded.
    """
    if not task.units:
        return
    with _cluster() as ray:
        cpus, room = _cpus_and_room(ray)
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(encode_remotely)
        files = ray.put(_vocabulary_files(task))
        arguments = (files, task.tokenizer.fingerprint, task.engine, package_versions())
        waiting = deque(task.units)
        out: dict[Any, Unit] = {}
        while waiting or out:
            # A third more than there are CPUs, so that none waits for text; one in any case.
            while waiting and len(out) <= cpus + cpus // 3 and (not out or _text_bytes(out, waiting[0]) <= room):
                unit = waiting.popleft()
                with _explained(ray):
                    # The name alone, since the folder is another one there.
                    there = replace(unit, path=Path(unit.path.name))
                    out[remote.remote(there, list(read_unit(unit)), *arguments)] = unit
            (ready,), _ = ray.wait([*out], num_returns=1)
            unit = out.pop(ready)
            with _explained(ray):
                content, counts, seconds = ray.get(ready)
            del ready  # so that the object store forgets it
            with write_atomic(unit.file(task.store), durable=False) as file:
                file.write(content)
            yield DoneUnit(unit.file(task.store), unit.identity, counts, seconds)


def _text_bytes(out: Mapping[Any, Unit], unit: Unit) -> int:
    """The text that is out, with that of one more unit."""
    return sum(each.text_bytes for each in (*out.values(), unit))


@contextmanager
def _cluster() -> Iterator[Any]:
    """Join the cluster of `$RAY_ADDRESS`, or the one that runs here, and leave it at the end."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "PIPELIB_EXECUTOR=ray needs the package ray, which is not installed, so nothing was encoded; install it on every "
            "machine of the cluster: pip install -c constraints.txt -e '.[ray]'"
        ) from None
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        # The packages of this project alone: what pip has installed must be there, and its versions are compared.
        code = [str(Path(pipelib.__file__).parent)]
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            runtime_env={"py_modules": code},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise UserError(
            f"PIPELIB_EXECUTOR=ray could not join a cluster ({_first_line(error)}), so nothing was encoded; start one with `ray "
            "start --head`, name another one with RAY_ADDRESS=HOST:PORT, and have the same version of ray "
            f"({ray.__version__}) and of Python everywhere."
        ) from None
    try:
        signal.signal(signal.SIGTERM, on_sigterm)  # which ray.init has replaced by one that knows nothing of stages
        yield ray
    finally:
        ray.shutdown()


def _cpus_and_room(ray: Any) -> tuple[int, int]:
    """Return the CPUs of the cluster, and the bytes of text that may be out at once: a quarter of this machine's object store.

    The other three quarters are for the tokens that come back, and for what Ray has not yet forgotten.

    Raises:
        UserError: the cluster has no CPU, or this machine's store no room for a unit.
    """
    cpus = int(ray.cluster_resources().get("CPU", 0))
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    memory = int(node["Resources"].get("object_store_memory", 0))
    if not cpus:
        raise UserError(
            "the cluster of Ray has no CPU, so no task could start; join machines with CPUs: ray start --address=HOST:PORT"
        )
    if memory < 4 * UNIT_BYTES:
        raise UserError(
            f"the object store of Ray has {format_bytes(memory)} on this machine, and a unit of text takes "
            f"{format_bytes(4 * UNIT_BYTES)}; start Ray here with --object-store-memory, in bytes."
        )
    return cpus, memory // 4


@contextmanager
def _explained(ray: Any) -> Iterator[None]:
    """Raise what a task or the cluster says as an error of ours. A bug keeps the traceback of its machine."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise RuntimeError(str(error)) from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"Ray failed ({type(error).__name__}: {_first_line(error)}), so this stage is not complete; run dvc repro again: it "
            "encodes only what is missing. If memory ran out, start Ray with fewer --num-cpus, or more --object-store-memory."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _vocabulary_files(task: Encoding) -> dict[str, bytes]:
    """Return the files of the vocabulary; none for GPT-2's, which every machine has."""
    if task.tokenizer == published_tokenizer():
        return {}
    return {path.name: path.read_bytes() for path in HERE.vocabulary.iterdir() if path.suffix == ".json"}


# ---- On the machines of the cluster ----------------------------------------------------------------------------------


def encode_remotely(
    unit: Unit,
    texts: list[Texts],
    vocabulary: Mapping[str, bytes],
    fingerprint: str,
    engine: str,
    packages: Mapping[str, str],
) -> Content:
    """Encode the text of a unit.

    Raises:
        UserError: this machine has other packages, or its engine's tokens are wrong.
    """
    require_same_packages(packages)
    with tempfile.TemporaryDirectory(prefix="pipelib-unit-") as folder:
        path = Path(folder, "unit")
        counts, seconds = encode_texts(texts, unit, _engine(engine, fingerprint, tuple(vocabulary.items())), path)
        return path.read_bytes(), counts, seconds


@cache
def _engine(name: str, fingerprint: str, vocabulary: tuple[tuple[str, bytes], ...]) -> Engine:
    """Load the engine once in each worker of Ray.

    Raises:
        UserError: the vocabulary that arrived is another one.
    """
    folder = Path(tempfile.mkdtemp(prefix="pipelib-vocabulary-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["PIPELIB_STATE_DIR"] = str(folder / "state")
    for file, content in vocabulary:
        (folder / file).write_bytes(content)
    tokenizer = read_tokenizer(folder) if vocabulary else published_tokenizer()
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{os.uname().nodename} has the vocabulary {tokenizer.fingerprint[:16]} where {fingerprint[:16]} is wanted, so its "
            "tokens would be others; have the same code on every machine."
        )
    return load_engine(name, tokenizer)
