"""The line of progress, as people read it."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelib import progress
from pipelib.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_bytes_rate_time_left_and_files(clock: SimpleNamespace, capfd: pytest.CaptureFixture[str]) -> None:
    line = Progress("hub: x/y", 28_500_000_000, "bytes", before=2_000_000_000)
    line.note = "5 of 14 files"
    line.add(1_000)
    clock.now += 100.0
    line.add(8_409_999_000)
    clock.now += 5.0
    line.add(1)
    line.close("28.5 GB, 14 of 14 files")
    assert capfd.readouterr().err.splitlines() == [
        "hub: x/y: 2.0 GB of 28.5 GB",
        "hub: x/y: 10.4 GB of 28.5 GB, 84.1 MB/s, 3 min 35 s left, 5 of 14 files",
        "hub: x/y: 28.5 GB, 14 of 14 files in 1 min 45 s",
    ]


def test_a_terminal_gets_one_line_that_is_rewritten(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    line = Progress("docs", 10, "files")
    clock.now += 1.0
    line.add(4)
    line.close()
    assert capfd.readouterr().err == (
        "\r\x1b[Kdocs: 0 of 10 files\r\x1b[Kdocs: 4 of 10 files, 4/s, 1.5 s left\r\x1b[Kdocs: 4 files in 1.0 s\n"
    )


def test_nothing_is_coloured_so_no_color_has_nothing_to_switch_off() -> None:
    """A terminal's line is rewritten (\\r, erase to its end); colours (SGR sequences, which end in m) are not used."""
    for path in (Path(__file__).parents[1] / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\\(?:x1b|033|u001b)\[[0-9;]*m", text), path
