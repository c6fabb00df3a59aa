"""Python with torch already imported: a fork of a server, one for each pytest worker, in place of a new interpreter.

For tests whose subject is neither how a process starts nor how it is killed; those start `sys.executable`. The server
imports packages of others, runs nothing of them, and knows nothing of pipelib: the fork imports that, from wherever its
folder and its environment say, so a copy of the checkout runs its own code.
"""

import atexit
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import connection as connections
from multiprocessing import forkserver, spawn
from pathlib import Path
from typing import Any

IMPORTED = (
    "torch", "torch._dynamo", "numpy", "yaml", "orjson", "tiktoken", "pyarrow.parquet", "pyarrow.compute", "pandas", "xxhash",
    "safetensors.torch", "awkward", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "markdown_it",
    "networkx", "ruamel.yaml", "configobj", "platformdirs.unix", "dvc.repo.index",
    "dvc.cli.parser", "dvc.commands.repro", "dvc.commands.status", "dvc.repo.open_repo", "dvc.repo.reproduce",
    "dvc.repo.artifacts", "dvc.repo.datasets", "dvc.repo.metrics", "dvc.repo.params", "dvc.repo.plots", "dvc.repo.stage",
    "dvc.data_cloud", "dvc.cachemgr", "dvc.lock", "dvc.rwlock", "dvc.scm", "dvc.utils.strictyaml",
    "dvc_data.hashfile.db.local", "fsspec.implementations.memory", "dulwich.ignore", "dulwich.worktree", "scmrepo.git",
)  # fmt: skip
"""What a stage, or dvc, takes seconds to import."""


def run_python(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments])` that captures text: `-m MODULE ...`, `-c PROGRAM ...` or a file."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        files = [stdout.fileno(), stderr.fileno()]
        status = _ask(_server()[0], words, str(cwd or Path.cwd()), os.environ if env is None else env, files)
        said = [file.seek(0) or file.read() for file in (stdout, stderr)]  # type: ignore[func-returns-value]
    done = subprocess.CompletedProcess(words, status, *said)
    if check:
        done.check_returncode()
    return done


def write_python(path: Path) -> None:
    """Make a program that other programs can run as `python`: it prints what it is given, and has its exit status."""
    path.write_text(
        f"#!{sys.executable} -IS\nimport runpy\n"
        f"raise SystemExit(runpy.run_path({__file__!r})['ask_for'](__import__('sys').argv[1:], {_server()[0]!r}))\n"
    )
    path.chmod(0o755)


def ask_for(words: list[str], address: str) -> int:
    """Run Python with these arguments, and everything else as this process has it; the exit status, as a shell's."""
    status = _ask(address, words, str(Path.cwd()), os.environ, [1, 2])
    return status if status >= 0 else 128 - status


def _ask(address: str, words: list[str], cwd: str, environment: Mapping[str, str], files: list[int]) -> int:
    """Have the server run a program, with these files as its output; its exit status, negative if a signal ended it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        socket.send_fds(server, [b"."], files)
        server.sendall(json.dumps({"words": words, "cwd": cwd, "env": dict(environment)}).encode())
        server.shutdown(socket.SHUT_WR)
        return int(server.makefile().readline())


@functools.cache
def _server() -> tuple[str, "subprocess.Popen[bytes]"]:
    """Start the server of this process; its address, and the process, which ends when this one does."""
    address = str(Path(tempfile.mkdtemp(prefix="warm")) / "socket")
    ends_with_us, ours = os.pipe()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(ends_with_us)],
        pass_fds=[ends_with_us], cwd="/", env=environment, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(ends_with_us)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:  # so that its time counts as this process's
        os.close(ours)
        server.wait(30)

    atexit.register(end)
    return address, server


# ---- The server ------------------------------------------------------------------------------------------------------


def serve(address: str, ends_with_client: int) -> None:
    """Import, and fork for each connection, until the client has ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # a fork that looked for garbage in all this would copy it
    child_ended, noticed = socket.socketpair()
    for end in (child_ended, noticed):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(noticed.fileno())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        clients: dict[int, socket.socket] = {}
        while ends_with_client not in (ready := select.select([listener, child_ended, ends_with_client], [], [])[0]):
            if listener in ready:
                connection = listener.accept()[0]
                if not (child := os.fork()):
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for inherited in (listener, child_ended, noticed, *clients.values()):
                        inherited.close()
                    os.close(ends_with_client)
                    answer(connection)
                clients[child] = connection
            if child_ended in ready:
                child_ended.recv(1000)
            for pid in [*clients]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    with clients.pop(pid) as client, suppress(OSError):  # it may have gone
                        client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    shutil.rmtree(Path(address).parent)


def answer(connection: socket.socket) -> None:
    """Run what a client asks for in this process, a fork of the server, which tells the client the exit status."""
    _, files, *_ = socket.recv_fds(connection, 1, 2)
    request = json.loads(connection.makefile().read())
    connection.close()
    for target, file in enumerate(files, 1):
        os.dup2(file, target)
        os.close(file)
    os._exit(run(request["words"], request["cwd"], request["env"]))


def run(words: list[str], cwd: str, environment: dict[str, str]) -> int:
    """As a new interpreter would with these arguments, in this folder and environment; the exit status."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    searched = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, arguments = words[0], words[1:]
    first = {"-m": cwd, "-c": ""}.get(kind, str(Path(kind).absolute().parent))
    sys.path[0:1] = [first, *searched]
    try:
        if kind == "-m":
            fork_workers()
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
        else:
            sys.argv = words
            runpy.run_path(kind, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if status == 1 and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def fork_workers() -> None:
    """Have the processes that this one would spawn be forks of one that has imported what this one has now, and no more.

    They import the program and get its environment as spawned ones do, and have the signals of a stage blocked.
    """
    real_context, real_data = multiprocessing.get_context, spawn.get_preparation_data

    def context(method: str | None = None) -> Any:
        return real_context("forkserver" if method == "spawn" else method)

    def data(name: str) -> dict[str, Any]:
        return {**real_data(name), "environment": dict(os.environ)}

    def prepare(data: dict[str, Any], real: Any = spawn.prepare) -> None:
        os.environ.clear()
        os.environ.update(data["environment"])
        real(data)

    multiprocessing.get_context, spawn.get_preparation_data, spawn.prepare = context, data, prepare  # type: ignore[assignment]
    address = connections.arbitrary_address("AF_UNIX")
    ends_with_us, ours = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        if not (server := os.fork()):
            os.close(ours)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - {signal.SIGCHLD})
            try:
                forkserver.main(listener.detach(), ends_with_us, [])
            finally:
                os._exit(0)
    os.close(ends_with_us)
    known: Any = forkserver._forkserver  # type: ignore[attr-defined]
    known._forkserver_address, known._forkserver_alive_fd, known._forkserver_pid = address, ours, server


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
