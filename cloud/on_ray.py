"""Train on several machines of a cluster of Ray: .venv/bin/python cloud/on_ray.py 2 --gpus 8

Ray keeps a process on each machine, and that runs cloud/node.sh there: torchrun trains, and Ray only starts it. Every machine has
a fresh clone of the same commit under the path of this one, with its `.venv`, and sees the folder $STATE.
docs/how-to/several-machines.md explains it.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError:
    sys.exit(
        "on_ray.py needs the package ray, which is not installed, so nothing was started; install it on every machine of the "
        "cluster: pip install -c constraints.txt -e '.[ray]'"
    )

END_SECONDS = 120
"""How long machines may take to save the step that they are at."""


class Node:
    """A machine of the training. A thread waits for its process, and another one may end that."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def endpoint(self) -> str:
        """HOST:PORT of this machine, where the others can meet it."""
        import socket

        with socket.socket() as free:
            free.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def run(self, number: int, environment: dict[str, str]) -> int:
        """Run the machine's part, and return its exit status."""
        checkout = environment.pop("CHECKOUT")
        own = {**os.environ, **environment, "PET_LOCAL_ADDR": ray.util.get_node_ip_address()}
        # It gets SIGTERM when this process dies, and saves the step that it is at.
        command = ["setpriv", "--pdeathsig", "TERM", f"{checkout}/cloud/node.sh", str(number)]
        self.process = subprocess.Popen(command, cwd=checkout, env=own)
        return self.process.wait()

    def stop(self) -> None:
        """Ask for a checkpoint and the end."""
        if self.process:
            self.process.terminate()


def main() -> int:
    """Start the machines, wait for the first one, and end what is left of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machines", type=int, help="how many")
    parser.add_argument("--gpus", type=int, default=0, help="of each machine")
    parser.add_argument("--cpus", type=int, default=1, help="of each machine")
    options = parser.parse_args()
    if "STATE" not in os.environ:
        sys.exit(
            "STATE is not set, so the machines could not share data and checkpoints; set it to a folder that all see."
        )
    try:
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        sys.exit(
            f"on_ray.py could not join a cluster ({error}); start one with `ray start --head`, or set RAY_ADDRESS."
        )
    nodes = start_nodes(options.machines, options.cpus, options.gpus)
    own = {name: value for name, value in os.environ.items() if name.startswith(("PIPELIB_", "MLFLOW_", "HF_"))}
    environment = own | {
        "STATE": os.environ["STATE"],
        "CHECKOUT": str(Path(__file__).absolute().parents[1]),
        "PIPELIB_NNODES": str(len(nodes)),
        "PIPELIB_RDZV_ENDPOINT": ray.get(nodes[0].endpoint.remote()),
    }
    running = [node.run.remote(number, environment) for number, node in enumerate(nodes)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return wait_for_first(running)
    finally:
        for node in nodes:
            node.stop.remote()
        ray.wait(running, num_returns=len(running), timeout=END_SECONDS)


def start_nodes(machines: int, cpus: int, gpus: int) -> list[Any]:
    """Have a process on each machine."""
    each = {"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})}
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    enough = [node for node in there if all(node.get(name, 0) >= count for name, count in each.items())]
    if len(enough) < machines:
        sys.exit(
            f"{machines} machines with {cpus} CPUs and {gpus} GPUs each are wanted, but the cluster of Ray has {len(enough)}, so "
            "nothing was started; lower what is wanted, or add machines: ray start --address=HOST:PORT"
        )
    group = placement_group([each] * machines, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    kind = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=2)(Node)
    where = [PlacementGroupSchedulingStrategy(group, number) for number in range(machines)]
    return [kind.options(scheduling_strategy=strategy).remote() for strategy in where]


def wait_for_first(running: list[Any]) -> int:
    """Wait until the first machine has ended, or another one has failed; the exit status."""
    left = list(running)
    while True:
        (ended,), left = ray.wait(left, num_returns=1)
        try:
            status: int = ray.get(ended)
        except ray.exceptions.RayError as error:
            why = error.cause if isinstance(error, ray.exceptions.RayTaskError) else type(error).__name__
            print(f"machine {running.index(ended)} was lost ({why}); run this again to resume", file=sys.stderr)
            return 1
        if status or ended == running[0]:
            return status


if __name__ == "__main__":
    sys.exit(main())
