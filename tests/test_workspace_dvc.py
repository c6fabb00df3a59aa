"""dvc.lock and the metrics in whatever state a merge, an editor or a full disk left them: a message, never a traceback."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli_compare import write_run

from pipelib.cli.main import main
from pipelib.errors import UserError
from pipelib.schema import conflict_line, parse_yaml
from pipelib.tracking.run import _out_md5s
from pipelib.workspace import dvc
from pipelib.workspace.dvc import (
    LockedEntry,
    LockedStage,
    how_to_restore,
    parse_lock,
    parse_metrics,
    read_lock,
    read_metrics,
)

LOCK = b"""schema: '2.0'
stages:
  train:
    cmd: python -m stages.train
    deps:
    - path: data/tokens
      hash: md5
      md5: 0123456789abcdef0123456789abcdef.dir
      size: 10
      nfiles: 2
    params:
      params.yaml:
        train:
          max_lr: 6e-05
    outs:
    - path: models
      hash: md5
      md5: 1123456789abcdef0123456789abcdef.dir
  evaluate:
    deps:
    - path: models
      md5: 1123456789abcdef0123456789abcdef.dir
    outs:
    - path: reports
"""
METRICS = json.dumps({"val_loss": 5.0, "steps": 8, "deep": {"er": [1, 2]}, "name": "x"}, indent=2).encode()
Parse = Callable[[bytes, str], dict[str, Any]]


def test_what_dvc_writes_is_read() -> None:
    model = LockedEntry("models", "1123456789abcdef0123456789abcdef.dir")
    assert parse_lock(LOCK, "dvc.lock") == {
        "train": LockedStage((LockedEntry("data/tokens", "0123456789abcdef0123456789abcdef.dir"),), (model,)),
        "evaluate": LockedStage((model,), (LockedEntry("reports", ""),)),
    }
    assert parse_lock(b"schema: '2.0'\nstages:\n", "dvc.lock") == {}
    assert parse_metrics(METRICS, "m") == {"val_loss": 5.0, "steps": 8, "deep.er": [1, 2], "name": "x"}


def test_no_file_is_no_stage_and_no_metric_and_a_folder_is_said(here: Path) -> None:
    assert read_lock() == {}
    assert read_metrics(here / "metrics/train.json") == {}
    (here / "dvc.lock").mkdir()
    with pytest.raises(UserError, match=r"dvc\.lock cannot be read \(Is a directory\)"):
        read_lock()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"# only a comment\n", "it is empty"),
        (b"[1]", "it is a list"),
        (b"3", "it is a whole number"),
        (b"stages: [1]", "stages is a list"),
        (b"stages: {train: 3}", "stages.train is a whole number"),
        (b"stages: {train: {outs: {path: models}}}", "stages.train.outs is a section, not a list"),
        (b"stages: {train: {outs: [models]}}", "stages.train.outs is text"),
        (b"stages: {train: {outs: [{md5: a}]}}", "without a path"),
        (b"stages: {train: {deps: [{path: a, md5: 3}]}}", "a has the invalid md5 3"),
        (b"stages: {train: {deps: [{path: a, md5: ../../b}]}}", "a has the invalid md5 '../../b'"),
        (b"stages: {a: {}, a: {}}", "given twice"),
        (LOCK[:12], "quoted scalar"),
        (b"\xff\xfe", "utf-8"),
        (b"a: !!int x", "invalid literal"),
        (b"a: !!timestamp x", "NoneType"),
        (b"a: !!bool x", "'x'"),
        (b"[" * 500, "recursion"),
    ],
)
def test_a_broken_lock_has_its_own_remedy(content: bytes, why: str) -> None:
    with pytest.raises(UserError) as error:
        parse_lock(content, "dvc.lock")
    said = str(error.value)
    assert said.startswith("dvc.lock is broken (")
    assert why in said.partition("), so it is unknown what DVC made")[0]
    assert "git checkout HEAD -- dvc.lock" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "content",
    [b"", b"3", b"[1]", b"null", b'{"a": 1', b"{" * 3, b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff"],
)
def test_broken_metrics_have_their_own_remedy(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^m is broken \(.*\), so its numbers cannot be read; take git's copy"):
        parse_metrics(content, "m")


def with_conflict(content: bytes, at: int, until: int) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(
        [
            *lines[:at],
            b"<<<<<<< HEAD\n",
            *lines[at:until],
            b"=======\n",
            *lines[at:until],
            b">>>>>>> other\n",
            *lines[until:],
        ]
    )


@given(st.sampled_from([(LOCK, parse_lock), (METRICS, parse_metrics), (LOCK, parse_yaml)]), st.data())
def test_conflict_markers_are_named_wherever_they_are(file: tuple[bytes, Parse], data: st.DataObject) -> None:
    content, parse = file
    lines = content.count(b"\n") + 1
    at = data.draw(st.integers(0, lines - 1))
    conflicted = with_conflict(content, at, data.draw(st.integers(at, lines)))
    assert conflict_line(content) is None
    for ends in (b"\n", b"\r\n"):
        with pytest.raises(UserError, match=rf"^file has git's conflict markers \(line {at + 1}\), so "):
            parse(conflicted.replace(b"\n", ends), "file")


TAGS = st.sampled_from(
    ["!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!binary", "!!set", "!!omap", "!!pairs", "!!str"]
)
PIECES = st.sampled_from(
    ["a", "1", "1.5", "[", "]", "{", "}", ": ", "- ", ", ", "&x ", "*x", "<<: ", "? ", "|", ">", "'", "2001-99-99"]
)


@given(st.lists(PIECES | TAGS.map(lambda tag: f" {tag} "), max_size=12).map("".join) | st.text(max_size=30))
def test_no_yaml_is_a_traceback(text: str) -> None:
    for parse in (parse_yaml, parse_lock):
        with suppress(UserError):
            parse(text.encode(), "file")


# ---- Every command that reads them -----------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=8
)


@st.composite
def replaced(draw: st.DrawFn) -> bytes:
    """A dvc.lock in which one value, at any depth, is another one."""
    lock = yaml.safe_load(LOCK)
    node: Any = lock
    while True:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or draw(st.booleans()):
            node[key] = draw(VALUES)
            return yaml.safe_dump(lock, allow_unicode=True).encode("utf-8", "surrogatepass")
        node = node[key]


ANY_LOCK = (
    st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode())
    | VALUES.map(lambda value: yaml.safe_dump(value).encode())
    | st.integers(0, len(LOCK)).map(lambda end: LOCK[:end])
    | st.integers(0, LOCK.count(b"\n")).map(lambda line: with_conflict(LOCK, line, line + 1))
    | replaced()
)


@pytest.fixture
def run(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a run and its model."""
    monkeypatch.setattr("pipelib.workspace.dvc.cache_folder", lambda root: root / ".dvc/cache")
    write_run(here, 0.0)
    write_run(here / "other", 0.1)
    for name in ("models/model.safetensors", "reports/model_card.md"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("---\n")
    return here


COMMANDS = [
    ["compare", "other", "workspace"],
    ["verify"],
    ["verify", "models"],
    ["publish", "--repo", "a/b", "--out", "../out"],
    ["track"],
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANY_LOCK)
def test_no_command_dies_of_a_dvc_lock(run: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (run / "dvc.lock").write_bytes(content)
    broken = list(dvc.problems(Path()))
    for command in COMMANDS:
        status = main(command)  # which raises what is not the user's
        said = capsys.readouterr().err
        assert status in (0, 1)
        if broken and command != ["track"]:
            assert status == 1
            assert "dvc.lock" in said
            assert how_to_restore("dvc.lock") in said
    _out_md5s(["train", "evaluate"])
    assert bool(broken) == ("so DVC's digests are not recorded" in capsys.readouterr().err)
    if broken:
        with pytest.raises(UserError) as error:
            read_lock()
        assert broken == [str(error.value)]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["train", "evaluate", "speed/train"]),
    st.binary(max_size=30)
    | VALUES.map(lambda value: json.dumps(value, default=str, skipkeys=True).encode())
    | st.dictionaries(st.sampled_from(["val_loss", "tokens", "seconds", "perplexity"]), VALUES).map(
        lambda value: json.dumps(value, default=str, skipkeys=True).encode()
    )
    | st.integers(0, len(METRICS)).map(lambda end: METRICS[:end])
    | st.integers(0, METRICS.count(b"\n")).map(lambda line: with_conflict(METRICS, line, line + 1)),
)
def test_compare_does_not_die_of_metrics(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    path = run / f"metrics/{name}.json"
    before = path.read_bytes()
    path.write_bytes(content)
    broken = list(dvc.problems(Path()))
    assert main(["compare", "other", "workspace"]) == main(["compare", "workspace", "other"])
    said = capsys.readouterr().err
    assert all(problem in said for problem in broken)
    path.write_bytes(before)
