"""A section of YAML becomes a dataclass exactly as its types say, or every problem of it is said at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

from pipelib.errors import UserError
from pipelib.schema import Bounds, Choice, NaturalInt, PositiveFloat, flatten, parse, read_yaml


@dataclass(frozen=True)
class Optimizer:
    max_lr: PositiveFloat
    beta: Annotated[float, Bounds(minimum=0, maximum=1)]


@dataclass(frozen=True)
class Section:
    steps: NaturalInt
    name: str
    compile: bool
    precision: Literal["fp32", "bf16"]
    limit: NaturalInt | None
    prompts: tuple[str, ...]
    optimizer: Optimizer

    def problems(self) -> Iterator[str]:
        if self.limit is not None and self.limit > self.steps:
            yield f"limit: {self.limit} is more than steps = {self.steps}."


GOOD: dict[str, object] = {
    "steps": 10,
    "name": "a",
    "compile": True,
    "precision": "bf16",
    "limit": None,
    "prompts": ["x", "y"],
    "optimizer": {"max_lr": 1e-3, "beta": 0.9},
}


def problems_of(**changes: object) -> list[str]:
    problems: list[str] = []
    result = parse(Section, {**GOOD, **changes}, "part", problems)
    assert (result is None) is bool(problems)
    return problems


def read(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml(path)


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-05", 6e-5), ("6e-4", 6e-4), ("6E-4", 6e-4), ("-1.5e3", -1500.0), ("1e9", 1e9), (".5", 0.5), ("1.", 1.0),
        ("3", 3), ("-3", -3), ("0123", 123), ("1_000_000", 1000000), (".inf", float("inf")),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("yes", "yes"), ("No", "No"), ("off", "off"), ("1:30", "1:30"), ("1.2.3", "1.2.3"), ("e5", "e5"),
        ("1_", "1_"), ("1__0", "1__0"), ("'6e-4'", "6e-4"), ("87f09149", "87f09149"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    found = read(tmp_path, f"key: {text}\n")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice, so one value would be lost"),
        ("a:\n  b: 1\n  b: 1\n", "the key 'b' is given twice"),
        ("a: [1\n", "is not valid YAML, so it cannot be read"),
        ("a: !!python/object:os.system {}\n", "is not valid YAML"),
        ("- a\n", "is a list, not sections"),
        ("", "is empty, not sections"),
        ("a: " + "9" * 5000, "is not valid YAML.* digits"),
        ("a: " + "[" * 10**4, "is not valid YAML.*recursion"),
    ],
)
def test_what_is_no_parameter_file_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_a_missing_file_and_one_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist.*copy one from presets/"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


# ---- Types -----------------------------------------------------------------------------------------------------------


def test_a_good_section_becomes_the_dataclass() -> None:
    problems: list[str] = []
    assert parse(Section, GOOD, "part", problems) == Section(
        10, "a", True, "bf16", None, ("x", "y"), Optimizer(1e-3, 0.9)
    )
    assert problems == []


def test_numbers_that_mean_the_same_are_taken() -> None:
    problems: list[str] = []
    section = parse(Section, {**GOOD, "steps": 1e9, "optimizer": {"max_lr": 1, "beta": 0}}, "", problems)
    assert section is not None, problems
    assert section.steps == 10**9
    assert type(section.steps) is int
    assert type(section.optimizer.max_lr) is float


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "part.stepz is not a parameter, so its value would be ignored; did you mean part.steps?"),
        ({"zzz": 1}, "part.zzz is not a parameter, so its value would be ignored; known here: steps, name"),
        ({"steps": "10"}, "part.steps: '10' is text; it must be a whole number."),
        ({"steps": 1.5}, "part.steps: 1.5 is a number; it must be a whole number."),
        ({"steps": True}, "part.steps: True is true/false; it must be a whole number."),
        ({"steps": None}, "part.steps: None is empty; it must be a whole number."),
        ({"steps": -1}, "part.steps: -1 must be at least 0."),
        ({"steps": 2**63}, "part.steps: 9223372036854775808 must be at most 9223372036854775807."),
        ({"steps": 10**400}, f"part.steps: {10**400} must be at most 9223372036854775807."),
        ({"optimizer": {"max_lr": 10**400, "beta": 0}}, f"part.optimizer.max_lr: {10**400} is not a finite number."),
        ({"name": 5}, "part.name: 5 is a whole number; it must be text."),
        ({"compile": "on"}, "part.compile: 'on' is text; it must be true or false."),
        ({"compile": 1}, "part.compile: 1 is a whole number; it must be true or false."),
        ({"precision": "bf61"}, "part.precision: 'bf61' is not one of fp32, bf16; did you mean bf16?"),
        ({"precision": 16}, "part.precision: 16 is not one of fp32, bf16"),
        ({"limit": "x"}, "part.limit: 'x' is text; it must be a whole number."),
        ({"limit": 11}, "part.limit: 11 is more than steps = 10."),
        ({"prompts": "x"}, "part.prompts: 'x' is text, not a list; write it as [a, b]."),
        ({"prompts": ["x", 2]}, "part.prompts[1]: 2 is a whole number; it must be text."),
        ({"optimizer": 3}, "part.optimizer is a whole number, not a section with keys"),
        ({"optimizer": {"max_lr": 0, "beta": 0.9}}, "part.optimizer.max_lr: 0 must be greater than 0."),
        ({"optimizer": {"max_lr": 1, "beta": 1.5}}, "part.optimizer.beta: 1.5 must be at most 1."),
        ({"optimizer": {"max_lr": float("nan"), "beta": 0}}, "part.optimizer.max_lr: nan is not a finite number."),
        ({"optimizer": {"max_lr": float("inf"), "beta": 0}}, "part.optimizer.max_lr: inf is not a finite number."),
        ({"optimizer": {"max_lr": 1}}, "part.optimizer.beta is missing, and no parameter has a default in code"),
    ],
)
def test_each_problem_names_the_key_the_value_and_the_remedy(changes: dict[str, object], message: str) -> None:
    (problem,) = problems_of(**changes)
    assert problem.startswith(message)


def test_all_problems_are_said_at_once() -> None:
    problems = problems_of(steps="x", precision="x", extra=1, optimizer={"max_lr": -1, "bta": 2})
    assert [problem.split()[0].rstrip(":") for problem in problems] == [
        "part.extra",
        "part.steps",
        "part.precision",
        "part.optimizer.bta",
        "part.optimizer.max_lr",
        "part.optimizer.beta",
    ]


# ---- A choice that has keys of its own -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"]
    radius: int
    color: str


@dataclass(frozen=True)
class Square:
    kind: Literal["square"]
    side: int
    color: str


class Shape:
    choice = Choice("kind", lambda: ["circle", "square"], lambda name: {"circle": Circle, "square": Square}[name])


def test_a_key_chooses_the_dataclass() -> None:
    problems: list[str] = []
    assert parse(Shape, {"kind": "square", "side": 2, "color": "red"}, "a", problems) == Square("square", 2, "red")
    assert problems == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"side": 2}, "a.kind is missing, and no parameter has a default in code; add it: circle, square."),
        ({"kind": "squares"}, "a.kind: 'squares' is not one of circle, square; did you mean square?"),
        ({"kind": ["square"]}, "a.kind: ['square'] is not one of circle, square"),
        (
            {"kind": "square", "sides": 2, "color": "red"},
            "a.sides is not a parameter, so its value would be ignored; did",
        ),
        (
            {"kind": "square", "radius": 2, "color": "red"},
            "a.kind: square needs other keys (missing: side; not needed: radius); change them in the file, or type "
            "`dvc exp run -S a.kind=square -S '+a.side=SIDE' -S '~a.radius'`, with a value instead of each name in capitals.",
        ),
        (
            {"kind": "circle", "radius": 2, "color": "red", "side": 1},
            "a.kind: circle needs other keys (not needed: side); change them in the file, or type "
            "`dvc exp run -S a.kind=circle -S '~a.side'`.",
        ),
        ({"kind": "circle", "radius": "x", "color": "red"}, "a.radius: 'x' is text; it must be a whole number."),
        ([], "a is a list, not a section with keys"),
    ],
)
def test_keys_of_another_choice_are_one_message_with_the_command(value: object, problem: str) -> None:
    problems: list[str] = []
    assert parse(Shape, value, "a", problems) is None
    assert problems[0].startswith(problem)
    assert len(problems) == (2 if "sides" in str(value) and "squares" not in str(value) else 1)


def test_flatten_names_every_value_by_its_path() -> None:
    problems: list[str] = []
    flat = dict(flatten(parse(Section, GOOD, "", problems)))
    assert flat["optimizer.max_lr"] == 1e-3
    assert list(flat) == [*list(GOOD)[:-1], "optimizer.max_lr", "optimizer.beta"]
