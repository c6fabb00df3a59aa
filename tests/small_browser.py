"""Chromium without a window, driven over the DevTools protocol through a pair of pipes: no other package is needed."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

from PIL import Image

CHROMIUM = shutil.which("chromium")
PIPES_FIRST = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium listens at file descriptor 3 and answers at 4."""


class Browser:
    """One page; leaving the `with` block ends the browser."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 800, *more: str) -> None:
        """Args:
        profile: an empty folder for what the browser keeps.
        more: options of Chromium.
        """
        assert CHROMIUM, "chromium is not installed"
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        options = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--force-color-profile=srgb",
            f"--window-size={width},{height}", f"--user-data-dir={profile}", "--remote-debugging-pipe", *more, "about:blank",
        )  # fmt: skip
        command = [sys.executable, "-c", PIPES_FIRST, str(to_browser), str(from_browser), CHROMIUM, *options]
        self._process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._number, self._session = b"", 0, ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._call("Page.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._write)  # the browser ends when nobody can speak to it
        os.close(self._read)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _call(self, method: str, **arguments: object) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                block = os.read(self._read, 1 << 16)
                assert block, f"chromium ended during {method}"
                self._rest += block
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, address: str) -> None:
        """Go to a page."""
        self._call("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def text(self) -> str:
        """What the page shows."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, f"{script} did not become true; the page shows:\n{self.text()}"
            time.sleep(0.1)
        return value

    def wait_for_text(self, *words: str) -> str:
        """Wait until the page shows all of these; what it shows."""
        for word in words:
            self.wait_for(f"document.body && document.body.innerText.includes({json.dumps(word)})")
        return self.text()

    def click(self, element: str) -> None:
        """Click with the mouse on the middle of what a JavaScript expression gives, once it is there."""
        self.wait_for(f"!!({element})")
        place = self.evaluate(
            f"(() => {{ const e = {element}; e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind, buttons in (("mouseMoved", 0), ("mousePressed", 1), ("mouseReleased", 0)):
            self._call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left" if kind != "mouseMoved" else "none",
                buttons=buttons, clickCount=int(kind != "mouseMoved"),
            )  # fmt: skip

    def type(self, text: str) -> None:
        """Type into what has the focus; a line end is the Enter key."""
        for part in re.split("(\n)", text):
            if part == "\n":
                for kind in ("keyDown", "keyUp"):
                    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
                    self._call("Input.dispatchKeyEvent", type=kind, **enter)
            elif part:
                self._call("Input.insertText", text=part)

    def screenshot(self, path: Path) -> None:
        """The page as a small PNG, of 64 colours."""
        data = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
        Image.open(io.BytesIO(data)).convert("RGB").quantize(64).save(path, optimize=True)


def element_with(text: str, tag: str = "*") -> str:
    """JavaScript: the innermost visible element that shows exactly this."""
    return (
        f"[...document.querySelectorAll({json.dumps(tag)})].filter(e => e.innerText && e.innerText.trim() === {json.dumps(text)}"
        " && e.getClientRects().length).pop()"
    )
