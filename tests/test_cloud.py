"""The recipes of cloud/: what they run survives a machine that is taken away."""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

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


def start(root: Path, state: Path) -> tuple[Clone, "subprocess.Popen[bytes]"]:
    """A recipe in a fresh clone whose training takes some seconds; it prints into `root/log.txt`."""
    root.mkdir()
    clone = Clone(root / "clone")
    clone.edit("params.yaml", "max_tokens: 2560", "max_tokens: 64000")
    clone.edit("params.yaml", "max_epochs: 1.0", "max_epochs: 100.0")
    with (root / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            shlex.split(commands()["kubernetes"]),
            cwd=clone.root, env={**clone.environment, "STATE": str(state)}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    return clone, process


def outs(clone: Clone) -> dict[str, bytes]:
    names = [path for top in ("models", "curves", "chat", "metrics") for path in files_under(clone.root / top)]
    return {
        path.relative_to(clone.root).as_posix(): path.read_bytes()
        for path in names
        if "speed" not in path.relative_to(clone.root).parts
    }


@pytest.mark.long
def test_a_second_machine_finishes_what_the_first_was_taken_from(tmp_path: Path) -> None:
    whole, process = start(tmp_path / "whole", tmp_path / "state-whole")
    assert process.wait(300) == 0, (tmp_path / "whole/log.txt").read_text(errors="replace")

    first, process = start(tmp_path / "first", tmp_path / "state")
    log, deadline = tmp_path / "first/log.txt", time.monotonic() + 300
    while not re.search(r"^step 1\d\d/", log.read_text(errors="replace"), re.MULTILINE):
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        assert process.poll() is None, log.read_text(errors="replace")
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # to the first process alone, as a container's runtime does
    time.sleep(5)
    for left in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        left.kill()  # the machine is gone
    assert process.wait() != 0
    assert "stopped by SIGTERM" in log.read_text(errors="replace")
    assert not (first.root / "models").exists()

    second, process = start(tmp_path / "second", tmp_path / "state")
    said = tmp_path / "second/log.txt"
    assert process.wait(300) == 0, said.read_text(errors="replace")
    assert re.search(r"resumes after step 1\d\d", said.read_text(errors="replace"))
    assert (tmp_path / "state/dvc.lock").read_bytes() == (second.root / "dvc.lock").read_bytes()
    assert outs(second).keys() == outs(whole).keys()
    assert [name for name, content in outs(second).items() if content != outs(whole)[name]] == []
