"""Record a training that is killed and goes on, as an animated picture: docs/images/kill_and_resume.gif.

    python bench/recording.py                needs an up-to-date `dvc repro`; takes two minutes

It trains the default model in a clone that shares this checkout's cache and environment, kills the process with SIGKILL after
step --kill-after, types the same command again, and compares the numbers with the committed ones. The lines are those that
were printed; waits are shortened, and long lines are cut.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs/images/kill_and_resume.gif"
COLUMNS, ROWS, SIZE = 72, 16, 15
COLOURS = {"text": "#e8e6e3", "typed": "#7cb7f2", "note": "#f2c14e", "back": "#17181a"}
COMMAND = "dvc repro --single-item --force train"
SHOWN = re.compile(r"^(training |step [\d,]+: validation|train: |ERROR|Running stage|Updating)")


@dataclass
class Screen:
    """The lines of a terminal, and a frame for each change."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    frames: list[Image.Image] = field(default_factory=list)
    milliseconds: list[int] = field(default_factory=list)

    def add(self, text: str, colour: str = "text", wait: int = 300) -> None:
        """Print a line."""
        self.lines.append((text if len(text) <= COLUMNS else f"{text[: COLUMNS - 3]}...", colour))
        font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", SIZE)
        width, height = int(font.getlength("x") * COLUMNS) + 20, (SIZE + 5) * ROWS + 20
        frame = Image.new("RGB", (width, height), COLOURS["back"])
        draw = ImageDraw.Draw(frame)
        for row, (line, shade) in enumerate(self.lines[-ROWS:]):
            draw.text((10, 10 + row * (SIZE + 5)), line, COLOURS[shade], font)
        self.frames.append(frame.quantize(palette=_palette(font), dither=Image.Dither.NONE))
        self.milliseconds.append(wait)

    def save(self, path: Path) -> None:
        """Write the animation; it begins anew after three seconds."""
        self.milliseconds[-1] = 3000
        self.frames[0].save(
            path, save_all=True, append_images=self.frames[1:], duration=self.milliseconds, loop=0, optimize=True
        )


def _palette(font: ImageFont.FreeTypeFont) -> Image.Image:
    """The same 16 colours for all frames: unchanged lines then take no space."""
    swatch = Image.new("RGB", (200, 100), COLOURS["back"])
    for row, colour in enumerate(("text", "typed", "note")):
        ImageDraw.Draw(swatch).text((0, 30 * row), "step: 0123456789 $", COLOURS[colour], font)
    return swatch.quantize(16, dither=Image.Dither.NONE)


def trained(clone: Path) -> Iterator[str]:
    """The lines of a training."""
    program = str(Path(sys.executable).parent / "dvc")
    command = [program, *COMMAND.split()[1:]]
    with subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            yield line.rstrip()


def kill_training(clone: Path) -> int:
    """Kill the process that trains in the clone; its id."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = (
                b"stages.train" in (folder / "cmdline").read_bytes() and (folder / "cwd").resolve() == clone.resolve()
            )
        except OSError:
            continue
        if is_ours:
            os.kill(int(folder.name), signal.SIGKILL)
            return int(folder.name)
    raise SystemExit("no training runs, so there is nothing to kill")


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kill-after", type=int, default=500, help="the step after which the process is killed")
    options = parser.parse_args()
    screen = Screen()
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "pipelib"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        (clone / ".venv").symlink_to(Path(sys.executable).parents[1])
        dvc = [str(Path(sys.executable).parent / "dvc")]
        cache = subprocess.run(
            [*dvc, "cache", "dir"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()
        subprocess.run([*dvc, "config", "--local", "cache.dir", str((ROOT / cache).resolve())], cwd=clone, check=True)
        subprocess.run([*dvc, "checkout", "--quiet"], cwd=clone, check=True)
        screen.add(f"$ {COMMAND}", "typed", 1200)
        killed = False
        for line in trained(clone):
            if SHOWN.match(line):
                screen.add(line, wait=350)
            step = re.match(r"step ([\d,]+)/", line)
            if step and not killed and int(step[1].replace(",", "")) >= options.kill_after:
                time.sleep(0.5)
                screen.add(f"$ kill -9 {kill_training(clone)}        # in another terminal", "note", 1500)
                killed = True
        screen.add(f"$ {COMMAND}", "typed", 1500)
        for line in trained(clone):
            if SHOWN.match(line):
                screen.add(line, wait=350)
        screen.add("$ git diff metrics/train.json", "typed", 1500)
        changed = subprocess.run(
            ["git", "diff", "metrics/train.json"], cwd=clone, check=True, capture_output=True, text=True
        ).stdout
        for line in changed.splitlines():
            screen.add(line)
        screen.add(f"$ # {'it differs' if changed else 'nothing: the same numbers as without the kill'}", "note", 3000)
    screen.save(OUT)
    print(f"{OUT}: {len(screen.frames)} frames, {OUT.stat().st_size / 1e3:,.0f} KB")


if __name__ == "__main__":
    main()
