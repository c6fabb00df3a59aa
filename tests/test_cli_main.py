"""The command itself: help without waiting, errors without tracebacks, quiet ends."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_project import CHECKOUT

from pipelib.cli import verify
from pipelib.cli.main import main
from pipelib.errors import UserError, as_typed
from pipelib.state import State

COMMANDS = ("plan", "doctor", "compare", "verify", "sample", "publish", "clean")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"\n  pipelib {command}" in said.partition("examples:")[2]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from pipelib.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'torch', 'numpy', 'yaml', 'mlflow', 'dvc', 'tiktoken'} & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stderr.strip() == ""


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: pipelib" in capsys.readouterr().err


def test_user_errors_are_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise UserError("3 is odd, so nothing would fit; use 4.")

    monkeypatch.setattr(verify, "run", fail)
    assert main(["verify"]) == 1
    assert capsys.readouterr().err == "pipelib: 3 is odd, so nothing would fit; use 4.\n"


def test_commands_in_messages_are_as_they_must_be_typed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    message = (
        "run `pipelib verify --repair`, then dvc repro; .venv/bin/dvc repro is dvc repro, and dvc.lock is no command."
    )
    assert as_typed(message) == message, "no environment is here"
    (here / ".venv/bin").mkdir(parents=True)
    (here / ".venv/bin/pipelib").touch()
    assert as_typed(message) == (
        "run `.venv/bin/pipelib verify --repair`, then .venv/bin/dvc repro; .venv/bin/dvc repro is .venv/bin/dvc repro, and "
        "dvc.lock is no command."
    )
    monkeypatch.setenv("VIRTUAL_ENV", str(here / ".venv"))
    assert as_typed(message) == message, "it is activated"


def test_the_summary_fits_on_a_screen(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the committed baseline, with a sample longer than what is shown of it."""
    shutil.copytree(CHECKOUT / "metrics", here / "metrics")
    (here / "reports").mkdir()
    (here / "reports/evaluation.md").write_text("````text\n" + ("word " * 50 + "\n") * 100 + "````\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["summary"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23, "and the prompt below"
    assert max(map(len, lines)) <= 80
    starts = {word: number for number, line in enumerate(lines) for word in line.split()[:1]}
    assert starts["Then"] - starts["Try"] == 3, "three commands to try"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds '[]' and not a JSON object"),
        ("3", "holds '3' and not a JSON object"),
        ("{}", "does not have the numbers of a whole run (KeyError("),
        ('{"parameters": "many", "steps": 1, "tokens": 1}', "does not have the numbers of a whole run (ValueError("),
        ('{"parameters": null, "steps": 1, "tokens": 1}', "does not have the numbers of a whole run (TypeError("),
        ("<<<<<<< HEAD", "is not JSON"),
        (None, "does not exist; run the stage that makes it"),
    ],
)
@pytest.mark.parametrize("name", ["train.json", "evaluate.json", "speed/train.json"])
def test_a_summary_of_other_files_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, words: str
) -> None:
    shutil.copytree(CHECKOUT / "metrics", here / "metrics")
    path = here / "metrics" / name
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    optional = name.startswith("speed") and content in (None, "{}")  # git does not have it
    assert main(["summary"]) == (0 if optional else 1)
    if not optional:
        message = capsys.readouterr().err
        assert words in message or ((content or "").startswith("{") and "the numbers of a whole run" in message)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"pipelib {importlib.metadata.version('pipelib')}\n"


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "run", stop)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err == ""


def test_our_own_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(verify, "run", break_down)
    with pytest.raises(ZeroDivisionError):
        main(["verify"])


def test_a_reader_that_went_away_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path))
    with State("train", {"a": 1}, {}):
        pass
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipelib.cli.main", "clean", "--dry-run"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
