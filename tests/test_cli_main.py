"""The command itself: help without waiting, errors without tracebacks, quiet ends."""

import argparse
import ast
import fcntl
import importlib.metadata
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_project import CHECKOUT

import pipelib
from pipelib.cli import main as main_module
from pipelib.cli.main import main, make_parser
from pipelib.cli.summary import next_steps
from pipelib.cli.table import print_table
from pipelib.cli.verify import Verify
from pipelib.errors import UserError, with_venv_paths
from pipelib.tracking.record import say
from pipelib.workspace.workdir import WorkDir

COMMANDS = [command.command for command in main_module.COMMANDS]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    before, _, examples = said.partition("\nexamples:\n")
    assert f"pipelib {command}" in examples
    assert max(map(len, before.splitlines())) <= 80


def test_help_imports_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    heavy = {"torch", "numpy", "yaml", "mlflow", "dvc", "tiktoken", "rich", "shtab", "difflib", "huggingface_hub"}
    program = (
        "import sys\n"
        "from pipelib.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print(*sorted({heavy} & set(sys.modules)), file=sys.stderr)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT / "src"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stderr.strip() == ""


def test_no_command_prints_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: pipelib" in capsys.readouterr().err


def test_ranks_of_a_job_around_it_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval would leave the result to the process of LOCAL_RANK 0."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([]) == 2
    assert "LOCAL_RANK" not in os.environ


def test_user_errors_are_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> int:
        raise UserError("3 is odd, so nothing would fit; use 4.")

    monkeypatch.setattr(Verify, "run", fail)
    assert main(["verify"]) == 1
    assert capsys.readouterr().err == "pipelib: 3 is odd, so nothing would fit; use 4.\n"


@pytest.fixture
def environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in a repository, not activated."""
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    (here / ".venv/bin").mkdir(parents=True)
    (here / ".venv/bin/pipelib").touch()
    return here / ".venv"


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("run `pipelib verify --repair`, then dvc repro.", "run `{}pipelib verify --repair`, then {}dvc repro."),
        ("{}dvc repro is dvc repro", "{}dvc repro is {}dvc repro"),
        ("`pipelib track --replay a` or `pipelib --help`", "`{}pipelib track --replay a` or `{}pipelib --help`"),
        (
            "`mlflow db upgrade URI`, or mlflow experiments restore",
            "`{}mlflow db upgrade URI`, or {}mlflow experiments restore",
        ),
        ("dvc config cache.type hardlink", "{}dvc config cache.type hardlink"),
        ("PIPELIB_RESUME=fresh dvc repro; git add -A", "PIPELIB_RESUME=fresh {}dvc repro; git add -A"),
        ("with python -m stages.train --join.", "with {}python -m stages.train --join."),
        ("run `pip install -c constraints.txt -e .`", "run `{}pip install -c constraints.txt -e .`"),
        ("`hf auth login`, (`dvc remote add x`)", "`{}hf auth login`, (`{}dvc remote add x`)"),
        ("dvc is not installed, and `dvc` alone or mlflow was", "dvc is not installed, and `dvc` alone or mlflow was"),
        ("dvc.lock, dvc.yaml, my-dvc repro, a/dvc repro", "dvc.lock, dvc.yaml, my-dvc repro, a/dvc repro"),
        ("texts/my dvc files/a.txt and on mlflow runs.txt", "texts/my dvc files/a.txt and on mlflow runs.txt"),
        ("python 3.11, python.org, python code", "python 3.11, python.org, python code"),
    ],
)
@pytest.mark.usefixtures("environment")
def test_commands_in_messages_are_as_they_must_be_typed(message: str, typed: str) -> None:
    message, typed = message.replace("{}", ".venv/bin/"), typed.replace("{}", ".venv/bin/")
    assert with_venv_paths(message) == typed
    assert with_venv_paths(typed) == typed


def test_commands_are_left_alone_only_where_they_can_be_typed(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", str(environment))
    assert with_venv_paths("run dvc repro") == "run dvc repro"
    (environment.parent / "link").symlink_to(environment)
    monkeypatch.setenv("VIRTUAL_ENV", str(environment.parent / "link"))
    assert with_venv_paths("run dvc repro") == "run dvc repro"
    monkeypatch.setenv("VIRTUAL_ENV", str(environment.parent / "another"))
    assert with_venv_paths("run dvc repro") == "run .venv/bin/dvc repro"
    (environment / "bin/pipelib").unlink()
    assert with_venv_paths("run dvc repro") == "run dvc repro", "installed in an environment of the user's own"


@pytest.mark.usefixtures("environment")
def test_every_command_in_a_text_of_ours_is_known_as_one() -> None:
    """Of all texts in the code, those with a real subcommand of pipelib, DVC or MLflow."""
    from dvc.cli.parser import get_main_parser

    subcommands = {
        "pipelib": _subcommands(make_parser()),
        "dvc": _subcommands(get_main_parser()),
        "mlflow": {"artifacts", "db", "experiments", "gc", "runs", "server", "ui"},
    }
    texts = {text for path in Path(pipelib.__file__).parent.rglob("*.py") for text in _texts(path)}
    found = [
        match
        for text in texts
        for program, names in subcommands.items()
        for match in re.findall(rf"(?<![\w./-]){program} (?:{'|'.join(sorted(names))})(?![\w-]).*", text)
    ]
    assert len(found) > 50
    assert [match for match in found if not with_venv_paths(match).startswith(".venv/bin/")] == []


def _subcommands(parser: argparse.ArgumentParser) -> set[str]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return set(action.choices)


def _texts(path: Path) -> Iterator[str]:
    """The texts in a file's code, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value


def test_tracking_and_summary_name_commands_as_they_must_be_typed(
    environment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say("run pipelib track --replay again")
    assert capsys.readouterr().err == "tracking: run .venv/bin/pipelib track --replay again\n"
    assert ".venv/bin/mlflow ui         all runs" in next_steps()
    monkeypatch.setenv("VIRTUAL_ENV", str(environment))
    assert ".venv" not in next_steps()
    assert [line.index(" all ") for line in next_steps().splitlines() if " all " in line] == [37, 37]


def test_the_summary_fits_on_a_screen(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the committed baseline, with a sample longer than what is shown of it."""
    shutil.copytree(CHECKOUT / "metrics", here / "metrics")
    (here / "reports").mkdir()
    (here / "reports/evaluation.md").write_text("````text\n" + ("word " * 50 + "\n") * 100 + "````\n")
    (here / "models").mkdir()
    (here / "chat/model").mkdir(parents=True)
    (here / "chat/answers.json").write_text('{"questions": [{"question": "Why?", "answer": "Because."}]}')
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["summary"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23, "and the prompt below"
    assert max(map(len, lines)) <= 80
    starts = {word: number for number, line in enumerate(lines) for word in line.split()[:1]}
    assert starts["Then"] - starts["Try"] == 4, "four commands to try"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "holds '[]' and not a JSON object"),
        ("3", "holds '3' and not a JSON object"),
        ("{}", "does not have the numbers of a complete run (KeyError("),
        ('{"parameters": "many", "steps": 1, "tokens": 1}', "does not have the numbers of a complete run (ValueError("),
        ('{"parameters": null, "steps": 1, "tokens": 1}', "does not have the numbers of a complete run (TypeError("),
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
        assert words in message or ((content or "").startswith("{") and "the numbers of a complete run" in message)


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"pipelib {importlib.metadata.version('pipelib')}\n"


def test_ctrl_c_ends_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Verify, "run", stop)
    assert main(["verify"]) == 130
    assert capsys.readouterr().err == ""


def test_our_own_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(Verify, "run", break_down)
    with pytest.raises(ZeroDivisionError):
        main(["verify"])


@pytest.mark.parametrize("line", ["clean --dry-run", "--help", "plan --help", "--version", "completion bash"])
def test_a_reader_that_went_away_is_not_an_error(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELIB_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT / "src"))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it, argparse drops a help text that cannot be written
    with WorkDir("train", {"a": 1}, {}):
        pass
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipelib.cli.main", *line.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_what_a_command_takes(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if found := shutil.which(shell):
        subprocess.run([found, "-n", script], check=True)
    assert all(word in script.read_text() for word in (*COMMANDS, "older-than", "baselines", "bf16"))


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["pl"], "plan plots-page"),
        (["clean", "--d"], "--dry-run"),
        (["clean", "--stage", "u"], "units"),
        (["plan", "--params", "p"], "params.yaml presets"),  # a file, or a folder on the way to one
        (["sample", "--model", "p"], "presets"),
        (["verify", "pa"], "params.yaml"),
        (["completion", ""], "bash zsh tcsh"),
    ],
)
def test_bash_completes_commands_options_choices_and_files(
    typed: list[str], completed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "presets").mkdir()
    (tmp_path / "params.yaml").touch()
    words = " ".join(f"'{word}'" for word in ("pipelib", *typed))
    script = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=({words}) COMP_CWORD={len(typed)}\n"
        f"_shtab_pipelib pipelib '{typed[-1]}'\necho $(printf '%s\\n' \"${{COMPREPLY[@]}}\")\n"
    )
    done = subprocess.run(["bash", "--norc", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert sorted(done.stdout.split()) == sorted(completed.split()), done.stderr


# ---- Tables ----------------------------------------------------------------------------------------------------------

ROWS = [
    ["", "HEAD", "workspace"],
    ["evaluate val_loss", "4.1234", "4.0123  -0.1111 (-0.1234 to -0.0987)"],
    ["data.[/red]", "[bold]:smile:", "[link=x]日本"],
]


def on_terminal(rows: list[list[str]], columns: int, **environment: str) -> str:
    """What a terminal gets of a table."""
    program = f"from pipelib.cli.table import print_table\nprint_table({rows!r})"
    main_end, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env={**kept, **paths, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment},
    )
    os.close(other_end)
    said = b""
    with suppress(OSError):  # Linux's end of file
        while block := os.read(main_end, 4096):
            said += block
    os.close(main_end)
    assert process.wait() == 0, said
    return said.decode().replace("\r\n", "\n")


def test_a_table_in_a_pipe_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS)
    assert capsys.readouterr().out == (
        "                   HEAD           workspace\n"
        "evaluate val_loss  4.1234         4.0123  -0.1111 (-0.1234 to -0.0987)\n"
        "data.[/red]        [bold]:smile:  [link=x]日本\n"
    )


@pytest.mark.parametrize("columns", [120, 80, 60, 45])
def test_a_table_on_a_terminal_shows_every_word_as_it_is(columns: int) -> None:
    lines = re.sub(r"\x1b\[[\d;]*m", "", on_terminal(ROWS, columns)).splitlines()
    assert max(map(len, lines)) <= columns
    assert "─" * 20 in lines[1]
    words = sorted(word for line in lines[2:] for word in line.split())
    assert words == sorted(word for row in ROWS[1:] for cell in row for word in cell.split())


def test_a_table_that_is_wider_than_the_terminal_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS)
    assert on_terminal(ROWS, 30) == capsys.readouterr().out


def test_a_table_has_no_colors_where_there_must_be_none() -> None:
    assert "\x1b" in on_terminal(ROWS, 80)  # a bold header
    assert not re.search(r"\x1b\[[\d;]*[34]\d", on_terminal(ROWS, 80, NO_COLOR="1"))
    assert "\x1b" not in on_terminal(ROWS, 80, TERM="dumb")
