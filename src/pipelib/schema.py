"""Read a YAML section into a frozen dataclass, or report everything that is wrong with it.

This file holds only the mechanism. Each package declares its own parameters (`corpus/params.py`, `training/params.py`,
...), so that a change there re-runs the stages of that package and no others. `params.py` puts the sections together.

DVC writes YAML 1.2, but PyYAML reads YAML 1.1, where `6e-05` is a string, `on` is a boolean and `1:30` is ninety. The
loader below reads numbers and booleans as YAML 1.2 does, and refuses duplicate keys.
"""

import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pipelib.errors import UserError

T = TypeVar("T")


class ParamsError(UserError):
    """Every problem of a parameter file, each with its key, its value and the remedy."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{path} has {count}; nothing was run.\n" + "\n".join(f"  - {line}" for line in problems))


@dataclass(frozen=True)
class Bounds:
    """The numbers a parameter may take; part of its type: `Annotated[float, Bounds(above=0)]`."""

    above: float = -math.inf
    """Greater than this."""
    minimum: float = -math.inf
    """This or greater."""
    maximum: float = math.inf
    """This or smaller."""

    def problem(self, value: float) -> str | None:
        """Return what is wrong with `value`, or None."""
        if isinstance(value, float) and not math.isfinite(value):  # isfinite fails for an int too large for a float
            return "is not a finite number."
        if value <= self.above:
            return f"must be greater than {self.above:g}."
        if value < self.minimum:
            return f"must be at least {self.minimum:g}."
        if value > self.maximum:
            return f"must be at most {self.maximum if isinstance(self.maximum, int) else f'{self.maximum:g}'}."
        return None


@dataclass(frozen=True)
class OneOf:
    """The words a parameter may be, when they are computed: `Annotated[str, OneOf(known_sources)]`."""

    names: Callable[[], Collection[str]]

    def problem(self, value: str) -> str | None:
        """Return what is wrong with `value`, or None."""
        known = self.names()
        return None if value in known else f"is not one of {', '.join(known)}{did_you_mean(value, known)}"


def did_you_mean(value: object, known: Collection[str]) -> str:
    """Return the end of a sentence about an unknown word: the most similar known word, or a full stop."""
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "."


@dataclass(frozen=True)
class Choice:
    """A section in which one key selects the dataclass that declares the others.

    The section's class has it as its attribute `choice`.
    """

    key: str
    """The key that selects the dataclass. Each dataclass has it as a field."""
    names: Callable[[], list[str]]
    """Returns the values that the key may have."""
    load: Callable[[str], type]
    """Returns the dataclass of such a value."""


MAX_INT = 2**63 - 1
"""The largest integer that a parameter may be: torch and NumPy accept it, and it converts to a float."""
PositiveInt = Annotated[int, Bounds(above=0, maximum=MAX_INT)]
NaturalInt = Annotated[int, Bounds(minimum=0, maximum=MAX_INT)]
PositiveFloat = Annotated[float, Bounds(above=0)]
NaturalFloat = Annotated[float, Bounds(minimum=0)]


class _Yaml12Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema."""


# Drop YAML 1.1's rules for booleans and numbers; those of YAML 1.2 are added below.
_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[1] not in ("bool", "int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_DIGITS = r"[0-9]+(?:_[0-9]+)*"  # 1_000_000 is not YAML 1.2, but DVC reads and writes it
_SCALARS = {
    "bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "int": (rf"^[-+]?{_DIGITS}$", "-+0123456789"),
    "float": (
        rf"^(?:[-+]?(?:{_DIGITS}\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+.0123456789",
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Yaml12Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(_pattern), list(_first))


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.MarkedYAMLError(
                problem=f"the key {key!r} is given twice, so one value would be lost; keep one",
                problem_mark=node.start_mark,
            )
    return dict(loader.construct_mapping(node, deep=True))


def _construct_int(_: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # 0123 is 123 in YAML 1.2; YAML 1.1 read it as octal


_Yaml12Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Yaml12Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML 1.2 file.

    Raises:
        UserError: the file is missing, is not YAML, or holds something other than a mapping.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, so there are no parameters; copy one from presets/.") from None
    return parse_yaml(content, str(path))


def parse_yaml(content: bytes, name: str) -> dict[str, Any]:
    """Parse YAML 1.2 text that holds a mapping.

    Args:
        name: what messages call the text.

    Raises:
        UserError: it is not YAML, or holds something other than a mapping.
    """
    try:
        value = load_yaml(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error}), so it cannot be read; save it as UTF-8.") from None
    except ValueError as error:
        if line := conflict_line(content):
            raise UserError(
                f"{name} has git's conflict markers (line {line}), so its values are ambiguous; keep one side of each "
                "conflict and delete the lines that start with <<<<<<<, ======= and >>>>>>>."
            ) from None
        raise UserError(f"{name} is not valid YAML, so it cannot be read; fix it: {error}") from None
    if not isinstance(value, dict):
        raise UserError(
            f"{name} is {kind_of(value)}, not sections of parameters, so no parameter can be read; copy a file "
            "from presets/."
        )
    return value


def load_yaml(content: bytes) -> Any:
    """Parse YAML 1.2 text.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        ValueError: it is not YAML, nests too deeply, or has a tag that does not fit its value, such as `!!int x`.
    """
    text = content.decode("utf-8")
    try:
        return yaml.load(text, _Yaml12Loader)
    except Exception as error:  # for a tag that does not fit its value, PyYAML may raise any exception
        raise ValueError(str(error) or type(error).__name__) from None


_CONFLICT = re.compile(rb"^(?:<<<<<<<|>>>>>>>)(?: |\r?$)", re.MULTILINE)


def conflict_line(content: bytes) -> int | None:
    """Return the number, from 1, of the first line that is one of git's conflict markers; None if there is none."""
    found = _CONFLICT.search(content)
    return content.count(b"\n", 0, found.start()) + 1 if found else None


def parse(cls: type[T], value: object, key: str, problems: list[str]) -> T | None:
    """Make an instance of the dataclass `cls` from the mapping `value`, which is under `key` in the file.

    Append every problem to `problems`, and return None if there is one: unknown and missing keys, wrong types, values out
    of range, and what the dataclass's own `problems()` method yields about invalid combinations.
    """
    if not isinstance(value, Mapping):
        problems.append(
            f"{key or 'the file'} is {kind_of(value)}, not a section with keys; see presets/ for the keys it needs."
        )
        return None
    # A section with a choice is declared by the dataclass that one of its keys selects.
    if isinstance(choice := vars(cls).get("choice"), Choice):
        chosen = _chosen(choice, value, key, problems)
        if chosen is None:
            return None
        cls = chosen
    assert dataclasses.is_dataclass(cls)
    before = len(problems)
    hints = get_type_hints(cls, include_extras=True)
    names = [field.name for field in dataclasses.fields(cls)]
    prefix = f"{key}." if key else ""
    # First the unknown keys, with the most similar name, then the missing ones and the values.
    for name in value:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(names)}."
            problems.append(f"{prefix}{name} is not a parameter, so its value would be ignored; {hint}")
    arguments: dict[str, Any] = {}
    for name in names:
        if name not in value:
            problems.append(
                f"{prefix}{name} is missing, and no parameter has a default in code; add it (see presets/)."
            )
        else:
            arguments[name] = _convert(hints[name], value[name], prefix + name, problems)
    if len(problems) > before:
        return None
    # Combinations can be checked only when every single value is valid.
    instance: T = cls(**arguments)
    for line in getattr(instance, "problems", tuple)():
        problems.append(f"{prefix}{line}")
    return instance if len(problems) == before else None


def _chosen(choice: Choice, value: Mapping[Any, Any], key: str, problems: list[str]) -> Any:
    """Return the dataclass that a section selects. If its keys do not fit, add a line to `problems` and return None.

    Misspelt keys are left to `parse`, which suggests the right ones.
    """
    prefix = f"{key}." if key else ""
    name = value.get(choice.key)
    known = choice.names()
    if choice.key not in value:
        problems.append(
            f"{prefix}{choice.key} is missing, and no parameter has a default in code; add it: {', '.join(known)}."
        )
        return None
    if name not in known:
        problems.append(f"{prefix}{choice.key}: {name!r} {OneOf(choice.names).problem(str(name))}")
        return None
    chosen = choice.load(str(name))
    names = [field.name for field in dataclasses.fields(chosen)]
    missing = [field for field in names if field not in value]
    extra = [str(field) for field in value if field not in names]
    if not (missing or extra) or any(difflib.get_close_matches(field, missing, n=1) for field in extra):
        return chosen
    # The message gives one command with all changes, because each change alone would be invalid.
    parts = [f"{what}: {', '.join(fields)}" for what, fields in (("missing", missing), ("not needed", extra)) if fields]
    changes = [f"-S '+{prefix}{field}={field.upper()}'" for field in missing]
    changes += [f"-S '~{prefix}{field}'" for field in extra]
    values = ", with a value instead of each name in capitals" if missing else ""
    problems.append(
        f"{prefix}{choice.key}: {name} needs other keys ({'; '.join(parts)}); change them in the file, or type "
        f"`dvc exp run -S {prefix}{choice.key}={name} {' '.join(changes)}`{values}."
    )
    return None


def _convert(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    """Convert `value` to the type `kind`, or add a line to `problems`."""
    if dataclasses.is_dataclass(kind):
        return parse(kind, value, key, problems)  # type: ignore[arg-type]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        converted = _convert(inner[0], value, key, problems)
        problem = None if converted is None else inner[1].problem(converted)
        if problem:
            problems.append(f"{key}: {value!r} {problem}")
        return converted
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _convert_choice([option for option in inner if option is not NoneType], value, key, problems)
    if origin is Literal:
        if value in inner and type(value) in {type(option) for option in inner}:  # True == 1, but is not a valid 1
            return value
        words = [str(option) for option in inner]
        problems.append(f"{key}: {value!r} is not one of {', '.join(words)}{did_you_mean(value, words)}")
        return None
    if origin is tuple:
        if not isinstance(value, list):
            problems.append(f"{key}: {value!r} is {kind_of(value)}, not a list; write it as [a, b].")
            return ()
        return tuple(_convert(inner[0], item, f"{key}[{index}]", problems) for index, item in enumerate(value))
    return _convert_scalar(kind, value, key, problems)


def _convert_choice(kinds: list[Any], value: Any, key: str, problems: list[str]) -> Any:
    """Convert `value` to one of several types: keep it if it is one of the allowed words, else use the first type."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if value in words:
        return value
    found: list[str] = []
    converted = _convert(kinds[0], value, key, found)
    # The message of the first type does not know the words, so add them.
    instead = f" or {', '.join(words)}" if words and len(kinds) > 1 and isinstance(value, str) else ""
    problems += [line.removesuffix(".") + instead + "." if instead else line for line in found]
    return converted


def _convert_scalar(kind: type, value: Any, key: str, problems: list[str]) -> Any:
    if kind is float and type(value) is int and abs(value) > sys.float_info.max:
        problems.append(f"{key}: {value} is not a finite number.")
        return None
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # so that users can write 1e9 tokens
    if type(value) is kind:
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    problems.append(f"{key}: {value!r} is {kind_of(value)}; it must be {words[kind]}.")
    return None


def kind_of(value: object) -> str:
    """Describe the type of a value of YAML or JSON in words: "a list", "a section", "empty"."""
    words: dict[type, str] = {
        NoneType: "empty", bool: "true/false", int: "a whole number", float: "a number", str: "text",
        list: "a list", dict: "a section",
    }  # fmt: skip
    return words.get(type(value), type(value).__name__)


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (`section.key`, value) for every value in a dataclass or mapping, nested ones included, in order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from flatten(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
