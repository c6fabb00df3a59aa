"""The first day on a GPU: check that training is correct, then measure, the most valuable minutes first.

    make bench-gpu                                         everything, about an hour
    python bench/gpu.py --minutes 9                        what fits into nine minutes, in this order
    python bench/gpu.py --only ab ddp                      some parts
    python bench/gpu.py --rehearse                         on a CPU with a small model: does every part run?

Every figure is printed as it is measured, one line of JSON each, so a run that is cut short has lost nothing. Each variant runs
in its own process, since the settings of the allocator and of the compiler are per process. docs/how-to/first-day-on-a-gpu.md
says what each part decides. Needs torch, numpy and PyYAML only. Exit status 1 if something failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from gpu_part import AB, CAPPED, DDP

ROOT = Path(__file__).resolve().parents[1]
Command = tuple[str, ...]
"""A program of `bench/` and its arguments."""
LARGER = {"gpt3-125m": 6, "gpt2-350m": 8, "gpt2-774m": 9, "gpt2-1558m": 9}
"""The other presets, and the minutes that each takes at most."""


def parts(rehearse: bool) -> dict[str, list[tuple[float, Command]]]:
    """What each part runs, and the minutes that it takes at most. The most valuable part comes first."""
    small = ("--rehearse",) if rehearse else ()

    def steps(preset: str, *options: str) -> Command:
        return ("train_step.py", "--params", f"presets/{preset}.yaml", "--rounds", "1", "--json", *options, *small)

    def part(name: str, *variant: str) -> Command:
        return ("gpu_part.py", name, *variant, *small)

    return {
        "checks": [(6, ("gpu_checks.py", *small))],
        "speed": [(6, steps("gpt2-124m", "--steps", "6"))],
        "profile": [(3, part("profile"))],
        "ab": [(4 if name == "max_autotune" else 1.3, part("ab", name)) for name in AB],
        "ddp": [(1.5, part("ddp", name)) for name in DDP],
        "run": [(9, part("run"))],
        "memory": [(2, part("memory", name)) for name in CAPPED],
        "ladder": [(8, steps("gpt2-124m", "--ladder", "--rows", "16"))],
        **{name: [(minutes, steps(name, "--steps", "4", "--variants", "ours"))] for name, minutes in LARGER.items()},
    }


def main() -> None:
    """Run the parts that were asked for and that the time allows."""
    every = list(parts(rehearse=False))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin nothing that may take longer; default: all"
    )
    parser.add_argument(
        "--only", nargs="+", choices=every, default=every, metavar="PART", help=f"of {', '.join(every)}; default: all"
    )
    parser.add_argument("--rehearse", action="store_true", help="a small model, on a CPU too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.rehearse:
        sys.exit(
            "there is no GPU here, so nothing was checked or measured; --rehearse runs every part with a small model."
        )
    end, failed = time.monotonic() + 60 * arguments.minutes, []
    for name, commands in parts(arguments.rehearse).items():
        for minutes, command in commands if name in arguments.only else ():
            if time.monotonic() + 60 * minutes > end:
                say(part=name, command=" ".join(command), skipped=f"may take {minutes:g} minutes, and fewer are left")
            elif not run(name, command, 60 * minutes):
                failed.append(" ".join(command))
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def run(part: str, command: Command, seconds: float) -> bool:
    """Run a command, print its figures as they come, and whether it ended well."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "bench" / command[0]), *command[1:]],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    # The whole group: a training that was left behind would disturb what is measured next.
    too_long = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
    too_long.start()
    for line in process.stdout:
        print(line if line.startswith("{") else f"# {line}", end="", flush=True)
    status = process.wait()
    too_long.cancel()
    say(part=part, command=" ".join(command), status=status, seconds=round(time.monotonic() - started, 1))
    return status == 0


def say(**values: object) -> None:
    """Print one line of JSON."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
