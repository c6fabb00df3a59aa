"""The recipes of cloud/: what they run survives a machine that is taken away, or one of two."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from small_project import CHECKOUT
from test_dvc import Clone

from pipelib.files import files_under

CLOUD = CHECKOUT / "cloud"


def commands() -> dict[str, str]:
    """What each recipe runs."""
    _, job = yaml.safe_load_all((CLOUD / "kubernetes.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "STATE", "value": container["volumeMounts"][0]["mountPath"]} in container["env"]
    task = yaml.safe_load((CLOUD / "skypilot.yaml").read_text(encoding="utf-8"))
    (volume,) = task["volumes"]
    assert Path(task["envs"]["STATE"]).is_relative_to(volume)
    (image,) = re.findall(r"^CMD (.*)$", (CLOUD / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "kubernetes": shlex.join(container["command"]),
        "skypilot": task["run"].strip(),
        "docker": shlex.join(json.loads(image)),
    }


def test_all_recipes_run_the_same() -> None:
    assert set(commands().values()) == {"cloud/run.sh"}


def test_without_a_disk_that_stays_nothing_runs(tmp_path: Path) -> None:
    script = tmp_path / "cloud/run.sh"
    script.parent.mkdir()
    script.write_bytes((CLOUD / "run.sh").read_bytes())
    done = subprocess.run(
        ["sh", str(script)], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "STATE: is not set, so the work would be lost with the machine" in done.stderr


def make_clone(root: Path) -> Clone:
    """A fresh clone whose training takes some seconds."""
    root.mkdir()
    clone = Clone(root / "clone")
    clone.edit("params.yaml", "max_tokens: 2560", "max_tokens: 64000")
    clone.edit("params.yaml", "max_epochs: 1.0", "max_epochs: 100.0")
    return clone


def run_recipe(clone: Clone, log: Path, command: str, **environment: str) -> "subprocess.Popen[bytes]":
    """Start what a recipe runs; it prints into `log`."""
    with log.open("wb") as file:
        return subprocess.Popen(
            shlex.split(command),
            cwd=clone.root, env={**clone.environment, **environment}, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def start(root: Path, state: Path, command: str = "", **environment: str) -> tuple[Clone, "subprocess.Popen[bytes]"]:
    """A recipe in a fresh clone, by default that of one machine; it prints into `root/log.txt`."""
    clone = make_clone(root)
    command = command or commands()["kubernetes"]
    return clone, run_recipe(clone, root / "log.txt", command, STATE=str(state), **environment)


def outs(root: Path) -> dict[str, bytes]:
    names = [path for top in ("models", "curves", "chat", "metrics") for path in files_under(root / top)]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in names
        if "speed" not in path.relative_to(root).parts
    }


def end_machine(process: "subprocess.Popen[bytes]") -> None:
    """Kill all that a recipe has started."""
    for left in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        left.kill()
    process.wait()


def wait_for_step(logs: Sequence[Path], processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Wait until one of the logs has a step of 100 to 199."""
    deadline = time.monotonic() + 300
    while not any(re.search(r"^(\x1b.*)?step 1\d\d/", log.read_text(errors="replace"), re.MULTILINE) for log in logs):
        said = "".join(log.read_text(errors="replace") for log in logs)
        assert time.monotonic() < deadline, said
        assert all(process.poll() is None for process in processes), said
        time.sleep(0.01)


@pytest.mark.long
def test_a_second_machine_finishes_what_the_first_was_taken_from(tmp_path: Path) -> None:
    whole, process = start(tmp_path / "whole", tmp_path / "state-whole")
    assert process.wait(300) == 0, (tmp_path / "whole/log.txt").read_text(errors="replace")

    first, process = start(tmp_path / "first", tmp_path / "state")
    log = tmp_path / "first/log.txt"
    wait_for_step([log], [process])
    process.send_signal(signal.SIGTERM)  # to the first process alone, as a container's runtime does
    time.sleep(5)
    end_machine(process)
    assert "stopped by SIGTERM" in log.read_text(errors="replace")
    assert not (first.root / "models").exists()

    second, process = start(tmp_path / "second", tmp_path / "state")
    said = tmp_path / "second/log.txt"
    assert process.wait(300) == 0, said.read_text(errors="replace")
    assert re.search(r"resumes after step 1\d\d", said.read_text(errors="replace"))
    assert (tmp_path / "state/dvc.lock").read_bytes() == (second.root / "dvc.lock").read_bytes()
    assert differing(second.root, outs(whole.root)) == []


# ---- Several machines ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outs of a run of two ranks that nothing disturbs, on one machine."""
    folder = tmp_path_factory.mktemp("two-ranks")
    clone, process = start(folder / "whole", folder / "state", PIPELIB_NPROC="2")
    assert process.wait(300) == 0, (folder / "whole/log.txt").read_text(errors="replace")
    return outs(clone.root)


def differing(root: Path, expected: dict[str, bytes]) -> list[str]:
    """The outs that are not those of `expected`."""
    made = outs(root)
    return sorted(name for name in made.keys() | expected.keys() if made.get(name) != expected.get(name))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def several(job: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """What the machines of a Job run, and with which environment, where both are this machine."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", "127.0.0.1") for entry in container["env"]}
    name = f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}:"
    assert environment["PIPELIB_RDZV_ENDPOINT"].startswith(name)
    assert int(environment["PIPELIB_NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    environment["PIPELIB_RDZV_ENDPOINT"] = f"127.0.0.1:{free_port()}"
    del environment["STATE"]
    return shlex.join(container["command"]), environment


@pytest.mark.long
def test_two_machines_of_kubernetes_finish_after_one_was_taken_away(
    tmp_path: Path, two_ranks: dict[str, bytes]
) -> None:
    _, service, job = yaml.safe_load_all((CLOUD / "kubernetes-nodes.yaml").read_text(encoding="utf-8"))
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    command, environment = several(job)

    def both(attempt: str) -> tuple[list[Path], list["subprocess.Popen[bytes]"]]:
        roots = [tmp_path / f"{attempt}-{number}" for number in range(2)]
        processes = [
            start(root, tmp_path / "state", command, JOB_COMPLETION_INDEX=str(number), **environment)[1]
            for number, root in enumerate(roots)
        ]
        return [root / "log.txt" for root in roots], processes

    logs, processes = both("first")
    wait_for_step(logs, processes)
    end_machine(processes[1])
    assert processes[0].wait(30) != 0
    logs, processes = both("second")
    said = "".join(log.read_text(errors="replace") for log in logs)
    assert [process.wait(300) for process in processes] == [0, 0], said
    assert "training resumes after step " in "".join(log.read_text(errors="replace") for log in logs)
    assert differing(tmp_path / "state/checkout", two_ranks) == []


SRUN = """#!{python}
import os, sys
from itertools import takewhile
words = [*takewhile(lambda word: word.startswith("--"), sys.argv[1:])]
options = dict(word.removeprefix("--").split("=") for word in words)
assert options["nodes"] == options["ntasks"] == "1" and "," not in options["nodelist"], options
os.execvp(sys.argv[1 + len(words)], sys.argv[1 + len(words):])
"""


@pytest.mark.long
def test_two_machines_of_slurm_save_a_step_when_the_time_is_nearly_up(
    tmp_path: Path, two_ranks: dict[str, bytes]
) -> None:
    """With stand-ins for `srun` and `scontrol`. Slurm's `--signal` sends SIGUSR1 to every process of all steps."""
    clone = make_clone(tmp_path / "shared")
    programs = {"srun": SRUN.format(python=sys.executable), "scontrol": "#!/bin/sh\necho 127.0.0.1\necho localhost\n"}
    for name, content in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(content)
        program.chmod(0o755)
    job = {
        "PATH": f"{program.parent}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "both", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": str(free_port()), "PET_LOCAL_ADDR": "127.0.0.1",
    }  # fmt: skip
    log = tmp_path / "first.txt"
    process = run_recipe(clone, log, "bash cloud/slurm.sh", **job)
    wait_for_step([log], [process])
    for each in psutil.Process(process.pid).children(recursive=True):
        each.send_signal(signal.SIGUSR1)
    assert process.wait(60) != 0
    assert "stopped by SIGUSR1 after step" in log.read_text(errors="replace")
    log = tmp_path / "second.txt"
    assert run_recipe(clone, log, "bash cloud/slurm.sh", **job).wait(300) == 0, log.read_text(errors="replace")
    assert "resumes after step 1" in log.read_text(errors="replace")
    assert differing(clone.root, two_ranks) == []


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines of Ray with one CPU each, as far as Ray is concerned."""
    pytest.importorskip("ray", reason="the package ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.mark.long
def test_two_machines_of_ray_finish_after_one_was_lost(
    tmp_path: Path, two_ranks: dict[str, bytes], cluster: Any
) -> None:
    logs = [tmp_path / f"{attempt}/log.txt" for attempt in ("first", "second")]
    on_ray, address = ".venv/bin/python cloud/on_ray.py 2", {"RAY_ADDRESS": cluster.address}
    _, process = start(tmp_path / "first", tmp_path / "state", on_ray, **address)
    wait_for_step(logs[:1], [process])
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    # the status of dvc, or 1 if Ray sees the loss first
    assert process.wait(180) != 0, logs[0].read_text(errors="replace")
    cluster.add_node(num_cpus=1)
    _, process = start(tmp_path / "second", tmp_path / "state", on_ray, **address)
    assert process.wait(300) == 0, logs[1].read_text(errors="replace")
    assert "training resumes after step " in logs[1].read_text(errors="replace")
    assert differing(tmp_path / "state/checkout", two_ranks) == []


@pytest.mark.long
def test_what_ray_cannot_do_for_a_training_is_said_in_one_line(tmp_path: Path, cluster: Any) -> None:
    def said(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, str(CLOUD / "on_ray.py"), *arguments],
            env={**os.environ, "RAY_ADDRESS": cluster.address, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    assert "STATE is not set" in said("2")
    assert "3 machines with 1 CPUs and 0 GPUs each are wanted, but the cluster of Ray has 2" in said("3", STATE="x")
    assert "2 machines with 4 CPUs and 0 GPUs each are wanted" in said("2", "--cpus", "4", STATE="x")
    (tmp_path / "ray.py").write_text("raise ImportError")
    assert "needs the package ray, which is not installed" in said("2", PYTHONPATH=str(tmp_path))
