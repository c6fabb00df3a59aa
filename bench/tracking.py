"""Time what tracking costs a stage: with MLflow off, with a dead, silent, broken, slow or good server, and with a local file.

    make bench-tracking
    make bench-tracking ARGS="--seconds 20 --repeats 5"

For each of these, a stage runs in its own process and logs 7 metrics ten times a second for --seconds. It measures opening the
run (hashing the code, calling git), the longest log call, and closing the run; its parent measures how long the process takes
to end after that. Then the parent asks MLflow how many points have arrived. All times are wall-clock seconds, the largest of
the repeats.
"""

import argparse
import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.params import load_params
from pipelib.processes import available_cores
from pipelib.stage import run_stage
from pipelib.tracking.mlflow_store import SERVER_WAIT_SECONDS, TrackingUri
from pipelib.tracking.run import open_run

ROOT = Path(__file__).resolve().parents[1]
LOGGED_PER_SECOND = 10
OFF = "off"
"""Instead of an address: MLflow is switched off, as by `logging.mlflow: false`."""


def stage(seconds: float) -> None:
    """Run as the stage, and print the times of tracking."""
    params = load_params()
    params = replace(params, logging=replace(params.logging, mlflow=os.environ.get("MLFLOW_TRACKING_URI") != OFF))
    times = {}
    mark = time.monotonic()
    with open_run("train", params, os.environ["FINGERPRINT"], {"bench": "0"}) as run:
        times["open"], times["longest"] = time.monotonic() - mark, 0.0
        for step in range(round(seconds * LOGGED_PER_SECOND)):
            mark = time.monotonic()
            run.log({f"train/{name}": 1.0 for name in ("loss", "lr", "grad_norm", "tokens", "a", "b", "c")}, step)
            times["longest"] = max(times["longest"], time.monotonic() - mark)
            time.sleep(1 / LOGGED_PER_SECOND)
        mark = time.monotonic()
    times["leave"] = time.monotonic() - mark
    print(json.dumps({**times, "left": time.monotonic()}), flush=True)


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers every request with a server error."""

    def do_GET(self) -> None:
        self.answer(503)

    def do_POST(self) -> None:
        self.do_GET()

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


class Slow(Broken):
    """Answers the first check, then takes four seconds for each error."""

    def do_GET(self) -> None:
        if self.path == "/":
            self.answer(200)
        else:
            time.sleep(4)
            self.answer(500)


@contextmanager
def http_server(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def black_hole() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run MLflow's server, with its database in `folder`; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise SystemExit("mlflow server did not start") from None
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def measure(uri: str | None, folder: Path, seconds: float, number: int) -> tuple[dict[str, float], str, str]:
    """Run one stage; return its times, its standard error, and its fingerprint."""
    fingerprint = f"{number:064d}"
    environment = {
        **os.environ, "PIPELIB_STATE_DIR": str(folder / "state"), "DVC_ROOT": str(folder), "FINGERPRINT": fingerprint,
        "DVC_EXP_NAME": f"bench-{number}",
    }  # fmt: skip
    environment |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
    command = [sys.executable, __file__, "--stage", str(seconds)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    ended = time.monotonic()
    times = json.loads(done.stdout.splitlines()[-1])
    times["exit"] = ended - times.pop("left")
    os.environ |= {name: environment[name] for name in ("PIPELIB_STATE_DIR", "DVC_ROOT")}
    return times, done.stderr.strip(), fingerprint


def arrived(uri: str | None, fingerprint: str) -> str:
    """The number of points of a stage that MLflow has; `-` if it cannot be asked."""
    tracking_uri = TrackingUri(uri, None) if uri else TrackingUri.chosen()
    try:
        store = tracking_uri.open()
        run = store.find(pipelib__fingerprint=fingerprint)
    except Exception:
        return "-"
    if run is None:
        return "0"
    return f"{sum(len(store.client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics):,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="how long a stage works (10)")
    parser.add_argument("--repeats", type=int, default=3, help="stages per kind of server (3)")
    parser.add_argument("--stage", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage is not None:
        run_stage("bench", lambda: stage(arguments.stage))
    points = 7 * round(arguments.seconds * LOGGED_PER_SECOND)
    print(
        f"{available_cores()} cores; stages of {arguments.seconds:g} s with {points:,} points, {arguments.repeats} per kind of "
        f"server; the largest times, in seconds; a server may cost {SERVER_WAIT_SECONDS:g} s\n"
    )
    print("| MLflow is | open | longest call | leave | process ends after | leave and end | points there |")
    print("|---|---|---|---|---|---|---|")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        servers: list[tuple[str, str | None]] = [
            ("switched off", OFF),
            ("a dead port", f"http://127.0.0.1:{port}"),
            ("a black hole", stack.enter_context(black_hole())),
            ("a server that answers 503", stack.enter_context(http_server(Broken))),
            ("a server that takes 4 s to fail", stack.enter_context(http_server(Slow))),
            ("a good server", stack.enter_context(mlflow_server(folder))),
            ("mlflow.db, created by the first", None),
        ]
        number = 0
        for name, uri in servers:
            rows, there = [], []
            for _ in range(arguments.repeats):
                number += 1
                times, _, fingerprint = measure(uri, folder, arguments.seconds, number)
                rows.append({**times, "all": times["leave"] + times["exit"]})
                there.append(fingerprint)
            counts = [arrived(uri, fingerprint) if uri is None or "good" in name else "-" for fingerprint in there]
            worst = {key: max(row[key] for row in rows) for key in rows[0]}
            cells = " | ".join(f"{worst[key]:.3f}" for key in ("open", "longest", "leave", "exit", "all"))
            print(f"| {name} | {cells} | {', '.join(counts)} |", flush=True)
    return


if __name__ == "__main__":
    main()
