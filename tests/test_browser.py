"""What people see: MLflow's pages of two runs, in Chromium, as `mlflow ui` shows them.

The screenshots in docs/images/ are this test's, of two experiments on Shakespeare (docs/how-it-works/tracking.md):
PIPELIB_TEST_DATABASE=mlflow.db PIPELIB_TEST_SCREENSHOTS=docs/images make test-long
"""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_browser import CHROMIUM, Browser, element_with
from small_tracking import CODE, FINGERPRINT, SEARCHED, FakeParams, runs, write

from pipelib.tracking.run import open_run

pytestmark = [
    pytest.mark.usefixtures("workspace"),
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.long,
]
RATES = {"lower-lr": 6e-4, "higher-lr": 1.8e-3}
REAL = os.environ.get("PIPELIB_TEST_DATABASE")
"""A database with two real experiments of these names and rates; without it, their losses are made up."""


@pytest.fixture
def database(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of the pipeline, real ones or by the code that tracks real ones."""
    if REAL:
        return Path(shutil.copy(REAL, tmp_path / "mlflow.db"))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    write("dvc.lock", {"stages": {"train": {"outs": [{"path": "models", "md5": "22.dir"}]}}})
    database = Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))
    for name, rate in RATES.items():
        monkeypatch.setenv("DVC_EXP_NAME", name)
        params: Any = FakeParams(train={"max_lr": rate, "compile": False})
        losses = [5 + 5.8 * math.exp(-step * rate * 20) for step in range(0, 200, 5)]
        write("metrics/train.json", {"val_loss": losses[-1], "parameters": 7242624, "tokens": 204800, "steps": 200})
        write("metrics/evaluate.json", {"val_loss": losses[-1], "perplexity": math.exp(losses[-1])})
        for stage in ("train", "evaluate"):
            with open_run(stage, params, FINGERPRINT, CODE) as run:
                for number, loss in enumerate(losses if stage == "train" else ()):
                    run.log({"train/loss": loss, "system/cpu_utilization_percentage": 90.0}, 5 * number)
    return database


@pytest.fixture
def interface(database: Path) -> Iterator[str]:
    """The address of `mlflow ui`, started in the repository without further options, as `make ui` does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (database.parent / "ui.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"],
            cwd=database.parent, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": SEARCHED},
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                said = (database.parent / "ui.txt").read_text()
                assert server.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def row_of(name: str) -> str:
    """JavaScript: the box to tick in a run's row of the table."""
    return (
        f"[...document.querySelectorAll('[row-id]')].filter(row => row.innerText.includes('{name}'))"
        ".flatMap(row => [...document.querySelectorAll(`[row-id=\"${row.getAttribute('row-id')}\"] .ag-checkbox-input`)])[0]"
    )


def test_two_runs_in_the_browser(
    interface: str, database: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "profile").mkdir()
    chosen = os.environ.get("PIPELIB_TEST_SCREENSHOTS")
    pictures = request.config.rootpath / chosen if chosen else tmp_path
    with Browser(tmp_path / "profile", 1280, 720) as browser:
        # the table of runs
        browser.open(f"{interface}/#/experiments/1/runs")
        browser.wait_for_text(*RATES, "A run here is a pass through the pipeline")
        browser.click("document.querySelector('[data-component-id=\"mlflow.assistant.chat_panel.close\"]')")
        browser.click(element_with("Model training"))  # MLflow begins with its view for chats
        browser.open(f"{interface}/#/experiments/1/runs")
        browser.wait_for_text(*RATES)
        for name in RATES:
            browser.click(row_of(name))
        browser.wait_for("document.querySelectorAll('[row-id].ag-row-selected').length >= 2")
        browser.screenshot(pictures / "mlflow_runs.png")

        # both, compared: what differs is there, with its values
        browser.click(element_with("Compare", "button"))
        below = () if REAL else ("evaluate.val_loss", "Metrics")  # real runs have parameters that fill the page
        page = browser.wait_for_text("Comparing 2 Runs from 1 Experiment", "train.max_lr", *below)
        assert "train.max_lr\t0.0006\t0.0018" in page
        assert REAL or "7242624" in page
        browser.wait_for("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
        browser.screenshot(pictures / "mlflow_compare.png")

        # a parent's page tells what came out and how to make it again
        key = "higher-lr"
        os.environ["DVC_EXP_NAME"] = key
        client = MlflowClient(f"sqlite:///{database}")
        (parent,), (train,) = runs(client, "pipeline"), runs(client, "train")
        browser.open(f"{interface}/#/experiments/1/runs/{parent.info.run_id}")
        browser.wait_for_text("Reproduce with", f"dvc exp apply {key}", "dvc checkout models", "validation loss")
        browser.click(element_with("Show more"))
        browser.screenshot(pictures / "mlflow_run.png")

        # a curve
        browser.open(f"{interface}/#/experiments/1/runs/{train.info.run_id}/model-metrics")
        browser.wait_for_text("loss")
        browser.wait_for("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length > 0")
        assert "cpu_utilization" not in browser.text()
        browser.evaluate(f"{element_with('loss')}.scrollIntoView({{block: 'center'}})")
        browser.screenshot(pictures / "mlflow_curve.png")
        browser.open(f"{interface}/#/experiments/1/runs/{train.info.run_id}/system-metrics")
        browser.wait_for_text("cpu_utilization_percentage")
