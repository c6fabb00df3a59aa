"""Any process of a training killed or signalled at any moment, then the same command again: an undisturbed run's bytes.

PIPELIB_TEST_RUNS says how many random kills there are, PIPELIB_TEST_SEED which ones; `pytest -s` shows them.
"""

import io
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_params import MUON, ROTARY
from small_project import CHECKOUT
from small_run import SmallProject, Training, kill, same
from warm_python import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a training in /proc")

RUNS = int(os.environ.get("PIPELIB_TEST_RUNS", "2"))
SEED = int(os.environ.get("PIPELIB_TEST_SEED") or random.SystemRandom().randrange(10**6))
KILLS_A_TRAINING = 8
STEPS = 40
ENDLESS = 64 * 10**6
"""Tokens of a training that no test sees the end of."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    return SmallProject.make(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """The same training, compiled."""
    return SmallProject.make(tmp_path_factory.mktemp("compiled"), train__compile=True)


@pytest.fixture
def endless(tmp_path: Path) -> SmallProject:
    """A training of a million steps, with a checkpoint only when it is stopped."""
    return SmallProject.make(
        tmp_path, train__max_tokens=ENDLESS, train__max_epochs=1e6, logging__checkpoint_every=10**6
    )


# ---- At random -------------------------------------------------------------------------------------------------------


@pytest.mark.random
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_at_random_instants_it_ends_with_the_same_bytes(project: SmallProject, ranks: int) -> None:
    kill_and_go_on(project, ranks, RUNS // 2)


@pytest.mark.random
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_instants_a_compiled_one_does_too(compiled: SmallProject, ranks: int) -> None:
    kill_and_go_on(compiled, ranks, max(4, RUNS // 8))


MUON_RECIPE = {"train__optimizer": "muon", "train__muon": MUON, "train__max_lr": 0.02, "train__min_lr": 0.0}
RECIPES: dict[str, dict[str, object]] = {
    "gpt2, muon, linear": {**MUON_RECIPE, "train__schedule": "linear"},
    "qwen3, muon, wsd": {
        **MUON_RECIPE, "train__schedule": "wsd", "train__cooldown": 0.5, "model": {"architecture": "qwen3", **ROTARY},
    },
    "llama, adamw, wsd": {
        "train__schedule": "wsd", "train__cooldown": 0.3, "model": {"architecture": "llama", **ROTARY, "rope_scaling": None},
    },
    "arcee, adamw, linear": {"train__schedule": "linear", "model": {"architecture": "arcee", **ROTARY}},
}  # fmt: skip
"""Every optimizer, schedule and family."""


@pytest.mark.random
@pytest.mark.parametrize("recipe", [pytest.param(name, marks=pytest.mark.long) for name in RECIPES])
def test_killed_at_random_instants_other_recipes_do_too(tmp_path: Path, recipe: str) -> None:
    kill_and_go_on(SmallProject.make(tmp_path, **RECIPES[recipe]), 1, RUNS // 2)


def kill_and_go_on(project: SmallProject, ranks: int, count: int) -> None:
    """Kill a training so many times, and compare what comes out in the end with one that nothing disturbed."""
    chance = random.Random(SEED + ranks)
    expected = project.uninterrupted(ranks)
    kills: Counter[str] = Counter()
    trainings = 0
    while kills.total() < count:
        project.begin_anew()
        most = min(kills.total() + KILLS_A_TRAINING, count)
        while kills.total() < most:
            training = project.start(ranks)
            victim = kill_at_random(training, chance)
            status = training.end()
            if not victim:
                assert status == 0, training.output()
                break
            kills[victim] += 1
            print(f"\nranks {ranks}, seed {SEED}, kill {kills.total()}: {victim} at step {training.step()}", end="")
        assert not same(project.run(ranks), expected), f"not the same bytes (PIPELIB_TEST_SEED={SEED})"
        trainings += 1
    print(
        f"\nranks {ranks}, seed {SEED}: {kills.total()} kills {dict(kills)} in {trainings} trainings, all bytes equal"
    )


def kill_at_random(training: Training, chance: random.Random) -> str:
    """Kill a random process of a training at a random instant; its role, or nothing where the training had ended.

    The instant lies anywhere in the time a start takes, or shortly after a random step, or in what follows the last one.
    """
    wait = chance.choice(["start", "step", "step", "end"])
    if wait == "start":
        deadline = time.monotonic() + chance.uniform(0, 6)
        training.wait_until(lambda: time.monotonic() > deadline)
    else:
        step = STEPS if wait == "end" else chance.randrange(1, STEPS)
        training.wait_until(lambda: training.step() >= step)
        time.sleep(chance.uniform(0, 0.8 if wait == "end" else 0.05))
    role_of = training.processes()
    if not role_of:
        return ""
    victim = chance.choice(sorted(role_of))
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
    return f"{number.name} to {role_of[victim]}" if kill(victim, number) else ""


# ---- At chosen places ------------------------------------------------------------------------------------------------

SITECUSTOMIZE = '''
"""Kills this process where TEST_KILL says: CALL MOMENT COUNT PATTERN, a call of os on a path; Python imports this file."""

import fnmatch
import os
import signal

call, moment, left, pattern = os.environ["TEST_KILL"].split()
left = int(left)
real = getattr(os, call)


def path_of(target, *_, dir_fd=None, **__):
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.join(folder, os.fspath(target))


def die():
    with open(os.environ["TEST_KILL_MARK"], "x"):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def killing(*arguments, **options):
    global left
    # what a rename is about is its new name
    hit = fnmatch.fnmatch(path_of(*arguments[call in ("rename", "replace"):], **options), pattern)
    left -= hit
    due = hit and left == 0
    if due and moment == "half":  # as if the kill had come while the file was written
        os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
    if due and moment != "after":
        die()
    result = real(*arguments, **options)
    if due:
        die()
    return result


setattr(os, call, killing)
'''
TRAIN = "import runpy; runpy.run_module('stages.train', run_name='__main__', alter_sys=True)"
META = "*/train/" + "[0-9a-f]" * 16 + "/meta.json"
PLACES = {
    # In the order in which one training passes them, so that each start goes on where the kill before left it.
    "inside the weights of the first checkpoint": "fsync half 1 */.step_00000005.tmp/.state.pt.*.tmp",
    "between a checkpoint's weights and its meta.json": "replace after 1 */.step_00000010.tmp/state.pt",
    "inside a checkpoint's meta.json": "fsync half 1 */.step_00000015.tmp/.meta.json.*.tmp",
    "before a checkpoint gets its name": "rename before 1 */checkpoints/step_00000020",
    "after a checkpoint got its name": "rename after 1 */checkpoints/step_00000025",
    "while an old checkpoint is removed": "unlink after 1 */step_00000020/*",
    "after the weights were exported": "replace after 1 */outs/models/model.safetensors",
    "inside the curves of the outs": "fsync half 1 */outs/curves/.samples.csv.*.tmp",
    "before the outs become final": "rename before 1 */final",
    "after the outs became final": "rename after 1 */final",
    "before the final outs are declared": f"replace before 2 {META}",
    "after the final outs were declared": f"replace after 2 {META}",
    "after an old out was removed": "rename before 1 curves",
    "between two outs": "rename after 1 curves",
    "after the second old out was removed": "rename before 1 models",
}
FEW_PLACES = [
    "inside the weights of the first checkpoint",
    "before a checkpoint gets its name",
    "after a checkpoint got its name",
    "inside the curves of the outs",
    "before the final outs are declared",
    "between two outs",
]
PLACES_OF_TWO_RANKS = [
    "inside the weights of the first checkpoint",
    "before a checkpoint gets its name",
    "after a checkpoint got its name",
    "after the weights were exported",
    "after an old out was removed",
]


@pytest.mark.parametrize(
    ("ranks", "places"),
    [
        pytest.param(1, FEW_PLACES, id="1"),
        pytest.param(1, list(PLACES), id="1, everywhere", marks=pytest.mark.long),
        pytest.param(2, PLACES_OF_TWO_RANKS, id="2, everywhere", marks=pytest.mark.long),
    ],
)
def test_killed_at_every_dangerous_place_it_ends_with_the_same_bytes(
    project: SmallProject, tmp_path: Path, ranks: int, places: list[str]
) -> None:
    expected = project.uninterrupted(ranks)
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    for out in ("models", "curves"):  # of an earlier training
        (project.folder / out).mkdir()
        (project.folder / out / "old.txt").write_text("not of this training")
    for number, place in enumerate(places):
        mark = tmp_path / f"killed-{number}"
        chosen = {"TEST_KILL": PLACES[place], "TEST_KILL_MARK": str(mark)}
        if places is FEW_PLACES:  # in a fork that need not import torch
            done = project.complete("-c", f"{SITECUSTOMIZE}\n{TRAIN}", **chosen)
            status, output = done.returncode, done.stdout + done.stderr
        else:
            training = project.start(ranks, PYTHONPATH=str(tmp_path), **chosen)
            status, output = training.end(), training.output()
        assert mark.exists(), f"passed without a kill: {place}\n{output}"
        assert status == -signal.SIGKILL if ranks == 1 else status != 0, place
    assert not same(project.run(ranks), expected)


# ---- Nothing is left running -----------------------------------------------------------------------------------------


@pytest.mark.long  # with a rank that trains: test_when_a_machine_dies; with two that start: the next test
def test_a_killed_launcher_takes_all_ranks_with_it(endless: SmallProject) -> None:
    training = endless.start(ranks=2)
    assert training.wait_until(lambda: training.step() >= 2)
    assert sorted(training.processes().values()) == ["launcher", "rank", "rank"]
    kill(training.process.pid)
    assert training.end() == -signal.SIGKILL


def test_ranks_that_are_only_just_starting_end_too(endless: SmallProject) -> None:
    training = endless.start(ranks=2)
    assert training.wait_until(lambda: "rank" in training.processes().values())
    kill(training.process.pid)
    assert training.end() == -signal.SIGKILL


DVC = """
import subprocess, sys
subprocess.run(["sh", "-c", f"PIPELIB_PARENT=$PPID exec {sys.executable} -m stages.train"])
"""


@pytest.mark.parametrize(("ranks", "steps"), [(1, 0), (1, 2), pytest.param(2, 2, marks=pytest.mark.long)])
def test_a_killed_dvc_takes_the_training_with_it(endless: SmallProject, ranks: int, steps: int) -> None:
    training = endless.start(ranks, [sys.executable, "-c", DVC])
    assert training.wait_until(lambda: training.step() >= steps and bool(training.processes()))
    kill(training.process.pid)
    assert training.end() == -signal.SIGKILL
    assert not (endless.folder / "models").exists()


# ---- Started again, and on several machines --------------------------------------------------------------------------


@pytest.mark.long
def test_ranks_are_started_again_after_one_was_killed(project: SmallProject) -> None:
    expected = project.uninterrupted(2)
    training = project.start(2, PIPELIB_MAX_RESTARTS="1")
    assert training.wait_until(lambda: training.step() >= 12)
    kill(next(pid for pid, role in training.processes().items() if role == "rank"))
    assert training.end() == 0, training.output()
    assert "training resumes after step " in training.output()
    assert not same(project.outs(), expected)


class TwoMachines:
    """Two machines of one rank each, played by this one: processes of their own that meet at a port."""

    def __init__(self, project: SmallProject) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self.project, self.running = project, dict[str, Training]()

    def start(self, name: str, **environment: str) -> Training:
        """Start the machine `first` or `second`."""
        command = [sys.executable, "-m", "stages.train", *(["--join"] if name == "second" else [])]
        several = {"PIPELIB_NNODES": "2", "PIPELIB_RDZV_ENDPOINT": self.endpoint, "PET_LOCAL_ADDR": "127.0.0.1"}
        self.running[name] = self.project.start(1, command, log=f"{name}.txt", **several, **environment)
        return self.running[name]

    def step(self) -> int:
        """The last step that rank 0 has done, on whichever machine it is."""
        return max(machine.step() for machine in self.running.values())

    def die(self, name: str) -> None:
        """Kill everything that runs on a machine at once."""
        for pid in self.running[name].processes():
            kill(pid)
        self.running[name].end()


@pytest.mark.long
def test_two_machines_of_one_rank_train_as_one_of_two(project: SmallProject) -> None:
    expected = project.uninterrupted(2)
    machines = TwoMachines(project)
    second = machines.start("second")
    assert second.wait_until(lambda: f"waiting for the training on {machines.endpoint}" in second.output())
    first = machines.start("first")
    assert first.end() == 0, first.output() + second.output()
    assert second.end() == 0, second.output()
    assert "on each of 2 ranks" in first.output() + second.output()
    assert "this machine is done; the first machine finishes the stage" in second.output()
    assert not same(project.outs(), expected)


def test_when_a_machine_dies_the_other_one_ends_at_once_and_resumes_alone(project: SmallProject) -> None:
    """Of that machine the launcher is killed, and takes its rank with it."""
    expected = project.uninterrupted(1)["curves/train.csv"]
    machines = TwoMachines(project)
    first = machines.start("first")
    second = machines.start("second")
    assert first.wait_until(lambda: machines.step() >= 12)
    assert sorted(second.processes().values()) == ["launcher", "rank"]
    kill(second.process.pid)
    assert second.end() == -signal.SIGKILL
    assert first.end(20) == 1
    assert "lost the connection to another rank" in first.output()
    assert "The last checkpoint is kept; run dvc repro to resume from it." in first.output()
    assert "Traceback" not in first.output()
    alone = project.complete()
    assert alone.returncode == 0, alone.stderr
    assert "had 2 ranks and resumes with 1: each step has the same batch" in alone.stdout + alone.stderr
    assert "not bit-identical" in alone.stdout + alone.stderr
    curves = (project.outs()["curves/train.csv"], expected)
    losses = [np.loadtxt(io.BytesIO(curve), delimiter=",", skiprows=1)[:, 2] for curve in curves]
    assert len(losses[0]) == STEPS
    assert np.allclose(*losses, rtol=1e-5, atol=0)


def test_a_machine_refuses_others_with_other_packages_and_ends_when_it_is_asked_to(
    project: SmallProject, tmp_path: Path
) -> None:
    project.begin_anew()
    machines = TwoMachines(project)
    first = machines.start("first")
    host, _, port = machines.endpoint.partition(":")
    assert first.wait_until(lambda: is_listening(host, int(port)))
    (tmp_path / "numpy-0.1.dist-info").mkdir()
    (tmp_path / "numpy-0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.1\n")
    other = machines.start("second", PYTHONPATH=str(tmp_path))
    assert other.end() == 1
    assert "is in use by a machine with other code: package numpy differ" in other.output()
    kill(first.process.pid, signal.SIGTERM)
    assert first.end(20) == 1
    assert "stopped by SIGTERM before the ranks could save a step" in first.output()


def is_listening(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.random
@pytest.mark.long
def test_one_of_two_machines_dies_at_random_instants_and_the_bytes_are_the_same(project: SmallProject) -> None:
    """A machine that has died is started again; the other one has ended by itself, or waits for it."""
    chance = random.Random(SEED)
    expected = project.uninterrupted(2)
    deaths = 0
    while deaths < RUNS:
        project.begin_anew()
        machines = TwoMachines(project)
        machines.start("first"), machines.start("second")
        while wait_at_random(machines, chance, deaths < RUNS):
            victim, other = chance.sample(sorted(machines.running), 2)
            step, survivor = machines.step(), machines.running[other]
            machines.die(victim)
            died = time.monotonic()
            if 0 < step < STEPS:  # they have met, and neither can train without the other
                survivor.end(20)
            deaths += 1
            said = f", the other one ended in {time.monotonic() - died:.1f} s" if 0 < step < STEPS else ""
            print(f"\nseed {SEED}, death {deaths}: the {victim} machine at step {step}{said}", end="")
            machines.start(victim)
        machines.die("second")  # it may wait for a training that was already done
        assert not same(project.outs(), expected), f"not the same bytes (PIPELIB_TEST_SEED={SEED})"


def wait_at_random(machines: TwoMachines, chance: random.Random, kill_more: bool) -> bool:
    """Wait for a random instant of a start, or for a random step, or for the end; false where the first machine has ended well.

    Meanwhile, as Slurm or Kubernetes does, start each machine again that has ended before.
    """
    now = time.monotonic()
    instant, deadline = (
        now + chance.uniform(0, 12),
        now + 600,
    )  # torchrun waits 300 s for one that dies after the last step
    step = 0 if chance.random() < 0.3 else chance.randrange(1, STEPS)
    while machines.running["first"].process.poll() != 0:
        for name, machine in list(machines.running.items()):
            assert "Traceback" not in machine.output(), machine.output()
            if machine.process.poll() is not None:
                machine.end()
                machines.start(name)
        if kill_more and (machines.step() >= step if step else time.monotonic() > instant):
            return True
        assert time.monotonic() < deadline, machines.running["first"].output() + machines.running["second"].output()
        time.sleep(0.01)
    return False


def test_a_machine_that_cannot_join_says_why(project: SmallProject, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as first:
        endpoint = f"127.0.0.1:{first.getsockname()[1]}"
        elsewhere = {"PIPELIB_NNODES": "2", "PIPELIB_RDZV_ENDPOINT": endpoint, "PIPELIB_STATE_DIR": str(tmp_path)}
        lonely = project.complete("-m", "stages.train", "--join", **elsewhere)
    assert lonely.returncode == 1
    assert "so there is nothing to join; all machines need the same params.yaml" in lonely.stderr
    assert "Traceback" not in lonely.stderr


def test_a_machine_that_no_other_joins_says_so() -> None:
    meeting = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--rdzv-id=test"]
    program = f"""
from pipelib.training.launch.torchrun import start_torchrun
start_torchrun([*{meeting}, "--rdzv-conf=is_host=1,join_timeout=1", "-m", "nothing"]).result(60)
"""
    done = run_python("-c", program, env={**os.environ, "PYTHONPATH": str(CHECKOUT / "src")})
    assert "UserError: the machines of this training did not find each other (RendezvousTimeoutError)" in done.stderr
    assert "start missing machines with python -m stages.train --join" in done.stderr


# ---- Asked to stop ---------------------------------------------------------------------------------------------------


def ask(training: Training, whom: str, number: signal.Signals) -> None:
    """Send a signal to a training's process group, as a terminal does, to one process of a role, or to every process."""
    if whom == "group":
        os.killpg(training.process.pid, number)
        return
    pids = [pid for pid, role in sorted(training.processes().items()) if whom in (role, "all")]
    for pid in pids if whom == "all" else pids[-1:]:
        kill(pid, number)


@pytest.mark.parametrize(
    ("ranks", "whom", "number"),
    [
        pytest.param(1, "group", signal.SIGTERM, marks=pytest.mark.long),  # with DVC around it: the next test
        pytest.param(1, "group", signal.SIGINT, marks=pytest.mark.long),
        pytest.param(2, "launcher", signal.SIGINT, marks=pytest.mark.long),
        pytest.param(2, "launcher", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(2, "rank", signal.SIGINT, marks=pytest.mark.long),
        pytest.param(2, "all", signal.SIGTERM, marks=pytest.mark.long),  # as a scheduler does it
        pytest.param(2, "all", signal.SIGUSR1, marks=pytest.mark.long),  # the tests below stop two ranks, too
        pytest.param(1, "group", signal.SIGUSR2, marks=pytest.mark.long),
        pytest.param(1, "group", signal.SIGXCPU, marks=pytest.mark.long),
        pytest.param(2, "launcher", signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_asked_to_stop_it_saves_the_step_it_is_at(
    project: SmallProject, ranks: int, whom: str, number: signal.Signals
) -> None:
    expected = project.uninterrupted(ranks)
    training = project.start(ranks)
    assert training.wait_until(lambda: training.step() >= 12)
    ask(training, whom, number)
    assert training.end() == 1
    step = training.step()
    assert f"train: stopped by {number.name} after step {step}, which is saved" in training.output()
    assert "Traceback" not in training.output()
    assert saved_step(project) == step
    assert not same(project.run(ranks, **A_JOB_AROUND_IT), expected)


A_JOB_AROUND_IT = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "9",
    "PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "192.0.2.1", "TORCHELASTIC_RUN_ID": "other",
}  # fmt: skip
"""As Kubernetes' PyTorchJob and torchrun set them: ranks that nobody starts."""


def saved_step(project: SmallProject) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name.removeprefix("step_")) for path in project.state.glob("train/*/*/checkpoints/step_*"))


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("ranks", "number"),
    [
        (1, signal.SIGUSR1),
        *(pytest.param(1, number, marks=LONG) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)),
        *(pytest.param(2, number, marks=LONG) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)),
    ],
)
def test_asked_to_stop_together_with_dvc_it_saves_the_step_it_is_at(
    project: SmallProject, ranks: int, number: signal.Signals
) -> None:
    """DVC dies of it, and of its death the stage gets SIGTERM."""
    expected = project.uninterrupted(ranks)
    training = project.start(ranks, [sys.executable, "-c", DVC])
    assert training.wait_until(lambda: training.step() >= 12)
    os.killpg(training.process.pid, number)
    assert training.end() == -number
    assert f"stopped by {number.name} after step {training.step()}, which is saved" in training.output()
    assert not same(project.run(ranks), expected)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_when_its_terminal_is_closed_it_saves_the_step_it_is_at(project: SmallProject, ranks: int) -> None:
    """A laptop's lid: the kernel sends SIGHUP, and whatever is printed from then on is an error."""
    expected = project.uninterrupted(ranks)
    ours, theirs = os.openpty()
    take_terminal = f"import fcntl, os, termios; fcntl.ioctl({theirs}, termios.TIOCSCTTY, 0); "
    take_terminal += f"[os.dup2({theirs}, number) for number in (0, 1, 2)]; "
    training = project.start(ranks, [sys.executable, "-c", take_terminal + DVC], pass_fds=(theirs,))
    os.close(theirs)
    shown = b""
    while b"step 12/" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert training.end() == -signal.SIGHUP
    assert not (project.folder / "models").exists()
    step = saved_step(project)
    assert step >= 12
    resumed = project.complete(ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert f"training resumes after step {step}:" in resumed.stdout + resumed.stderr
    assert not same(project.outs(), expected)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=lambda number: number.name
)
def test_a_second_run_says_who_holds_the_lock_and_asked_twice_the_first_ends_at_once(
    endless: SmallProject, number: signal.Signals
) -> None:
    training = endless.start(ranks=2)
    assert training.wait_until(lambda: training.step() >= 2)
    for pid, role in training.processes().items():
        if role == "rank":
            kill(pid, signal.SIGSTOP)  # so that no step ends
    second = endless.complete()
    assert second.returncode == 1
    assert f"is in use by process {training.process.pid}" in second.stderr
    assert f"kill {training.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    kill(training.process.pid, number)
    assert training.wait_until(lambda: bool(list(endless.state.glob("train/*/*/stop.txt"))))
    kill(training.process.pid, number)
    assert training.end() == -number
    assert "Traceback" not in training.output()


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.long)])
def test_signalled_while_it_imports_torch_it_ends_without_a_traceback(endless: SmallProject, ranks: int) -> None:
    training = endless.start(ranks)
    role = "rank" if ranks > 1 else "launcher"
    assert training.wait_until(lambda: role in training.processes().values())
    ask(training, "all", signal.SIGHUP)
    assert training.end() == (1 if ranks > 1 else -signal.SIGHUP)
    assert "Traceback" not in training.output()
    assert ("train: stopped by SIGHUP before the ranks could save a step" in training.output()) == (ranks > 1)
