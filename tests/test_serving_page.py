"""The page of `pipelib serve` in Chromium, which cannot reach any other host.

The pictures in docs/images/serve_*.png are this test's, of the default run and of one without fine-tuning:
PIPELIB_TEST_RUNS=1 PIPELIB_TEST_MODELS="chat/model models" PIPELIB_TEST_SCREENSHOTS=docs/images pytest tests/test_serving_page.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_browser import CHROMIUM, Browser, element_with
from small_chat import base_model
from small_vocabulary import TOKENIZER

from pipelib.model.huggingface import export_model
from pipelib.vocabulary.chat import ChatTemplate

pytestmark = [pytest.mark.long, pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")]
CUT_OFF = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
QUESTION = "What does numpy.clip do?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model that answers and one that completes."""
    if chosen := os.environ.get("PIPELIB_TEST_MODELS"):
        return chosen.split()
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("answers", 1), ("completes", 2)):
        model = base_model("qwen3", TOKENIZER.size)
        model.initialise(seed)
        export_model(model, TOKENIZER, root / name, {}, ChatTemplate.of(TOKENIZER) if name == "answers" else None)
    return [str(root / name) for name in ("answers", "completes")]


@pytest.fixture(scope="module")
def address(folders: list[str]) -> Iterator[str]:
    command = [sys.executable, "-m", "pipelib.cli.main", "serve", "--model", *folders, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": "src"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        while not (found := re.search(r"http://[\d.:]+", line := process.stdout.readline())):
            assert line, "the server has ended"
        yield found.group()
        process.terminate()


def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    chosen = os.environ.get("PIPELIB_TEST_SCREENSHOTS")
    return request.config.rootpath / chosen if chosen else tmp_path


@contextmanager
def opened(address: str, folder: Path) -> Iterator[Browser]:
    """The page, in a new browser."""
    (folder / "profile").mkdir()
    with Browser(folder / "profile", 1000, 640, CUT_OFF) as browser:
        browser.open(address)
        yield browser


def test_two_models_answer_side_by_side(
    address: str, folders: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with opened(address, tmp_path) as browser:
        browser.wait_for_text(folders[0], "was not fine-tuned")
        browser.wait_for("document.activeElement.id === 'prompt'")
        browser.evaluate("document.getElementById('temperature').value = 0")
        browser.type(f"{QUESTION}\n")
        browser.wait_for(
            "document.querySelectorAll('.turn.assistant').length >= 1 && document.getElementById('stop').disabled"
        )
        assert browser.evaluate("document.querySelector('.turn.assistant').textContent") not in ("", "…")
        assert "use /v1/completions" in browser.text(), "the other model says why it cannot"
        browser.evaluate("document.getElementById('second').value = ''; document.getElementById('second').onchange()")
        browser.type("What does it return?\n")
        browser.wait_for(
            "document.querySelectorAll('.turn.assistant').length == 2 && document.getElementById('stop').disabled"
        )
        browser.screenshot(pictures(request, tmp_path) / "serve_chat.png")
        browser.click(element_with("New", "button"))
        browser.wait_for("document.querySelectorAll('.turn').length == 0")
        # an answer is stopped by Esc
        browser.evaluate(
            "$('prompt').value = 'blue'; go(); document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
        )
        browser.wait_for("document.getElementById('stop').disabled")
        assert browser.evaluate("document.querySelector('.turn.assistant').textContent") == ""


def test_a_completion_shows_what_else_was_likely(
    address: str, folders: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with opened(address, tmp_path) as browser:
        browser.wait_for_text(folders[0])
        browser.click("document.getElementById('tab-complete')")
        browser.evaluate(
            "document.getElementById('temperature').value = 0.7; document.getElementById('seed').value = 1"
        )
        browser.click("document.getElementById('prompt')")
        browser.type("Returns the")
        browser.click(element_with("Complete", "button.main"))
        browser.wait_for("document.querySelectorAll('.token').length > 5 && document.getElementById('stop').disabled")
        browser.click("document.querySelectorAll('.token')[2]")
        shares = browser.evaluate(
            "[...document.querySelector('.bars').rows].map(row => parseFloat(row.cells[1].textContent))"
        )
        assert len(shares) == 10
        assert shares == sorted(shares, reverse=True)
        browser.evaluate("document.getElementById('main').scrollTop = 0")
        browser.screenshot(pictures(request, tmp_path) / "serve_complete.png")
        # one token alone, on a telephone in the dark
        browser._call("Emulation.setDeviceMetricsOverride", width=390, height=760, deviceScaleFactor=1, mobile=True)
        browser.click("document.getElementById('theme')")
        browser.click(element_with("Next token", "button"))
        browser.wait_for(
            "document.querySelectorAll('.bars tr').length == 20 && document.getElementById('stop').disabled"
        )
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390, "nothing is cut off"
        assert browser.evaluate("document.documentElement.dataset.theme") == "dark"
        browser.screenshot(pictures(request, tmp_path) / "serve_phone.png")
