"""A subcommand of `pipelib`: a frozen dataclass whose fields are its arguments.

    @dataclass(frozen=True)
    class Greet(Command):
        command = "greet"
        help = "say hello"
        description = "Print a greeting."
        examples = "examples:\\n  pipelib greet --name Ada"

        name: str = option("whom to greet; default: you", default="you")

        def run(self) -> int:
            print(f"hello, {self.name}")
            return 0

`add_parser` builds an argparse parser from the fields, and `Parser.parse_command` builds the dataclass from the
command line. A command imports what only it needs inside `run`, so that all other commands start fast.
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar, get_args, get_origin, get_type_hints, overload

T = TypeVar("T")

# shtab's names for what a shell completes; only `pipelib completion` imports shtab.
FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/", "tcsh": "d"}


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its help texts, its arguments, and its work."""

    command: ClassVar[str]
    """The word after `pipelib`."""
    help: ClassVar[str]
    """Its line in `pipelib --help`."""
    description: ClassVar[str]
    """The paragraph of `pipelib COMMAND --help`."""
    examples: ClassVar[str]
    """The text below the options: `examples:` with one line each, and any notes."""

    def run(self) -> int:
        """Do the work and return the exit status: 0, or 1 if the answer is no.

        Raises:
            UserError: the user can fix this; `main` prints the message and returns 1.
        """
        raise NotImplementedError

    @classmethod
    def add_parser(cls, parsers: "argparse._SubParsersAction[Parser]") -> None:
        """Add this subcommand to the parsers; a parsed namespace has its class in `command`."""
        parser = parsers.add_parser(cls.command, help=cls.help, description=cls.description, epilog=cls.examples)
        parser.set_defaults(command=cls)
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            _add_argument(parser, field, hints[field.name])

    @classmethod
    def parsed(cls, arguments: argparse.Namespace) -> Self:
        """Build the command from what argparse found; lists become tuples."""
        found = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


# ---- Arguments -------------------------------------------------------------------------------------------------------


@overload
def option(
    help: str, *, metavar: str = ..., choices: Sequence[str] = ..., nargs: str = ..., action: str = ...
) -> Any: ...
@overload
def option(
    help: str, *, default: T, metavar: str = ..., choices: Sequence[str] = ..., nargs: str = ..., action: str = ...
) -> T: ...
def option(help: str, **settings: Any) -> Any:
    """Declare a field that is passed as `--its-name VALUE`: required without a default, a switch if it is a bool. `run_` is
    passed as `--run`.

    The field's type gives the type of one value, or its choices: int for `int`, `int | None` and `tuple[int, ...]`,
    a or b for `Literal["a", "b"]`.

    Args:
        help: text for the user, with the default in words.
        default: the value if the option is not given.
        metavar: the name of the value in the help; by default the field's name in capitals.
        choices: the allowed values, if the type does not list them.
        nargs: `*` or `+` for several values in a row, which become a tuple.
        action: argparse's, for example `extend` for an option that may be repeated.
    """
    return _field(settings | {"help": help}, is_positional=False)


@overload
def positional(help: str, *, metavar: str = ..., nargs: str = ...) -> Any: ...
@overload
def positional(help: str, *, default: T, metavar: str = ..., nargs: str = ...) -> T: ...
def positional(help: str, **settings: Any) -> Any:
    """Declare a field that is passed by position; see `option`. With a default, `nargs` is `?` or `*`."""
    return _field(settings | {"help": help}, is_positional=True)


def _field(settings: dict[str, Any], *, is_positional: bool) -> Any:
    metadata = {"settings": settings, "is_positional": is_positional}
    return dataclasses.field(default=settings.get("default", dataclasses.MISSING), kw_only=True, metadata=metadata)


def _add_argument(parser: argparse.ArgumentParser, field: "dataclasses.Field[Any]", hint: Any) -> None:
    settings, kind = dict(field.metadata["settings"]), _kind(hint)
    if kind is bool:
        settings["action"] = "store_true"
    elif get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    elif kind is not str:
        settings["type"] = kind
    if field.metadata["is_positional"]:
        action = parser.add_argument(field.name, **settings)
    else:
        settings["required"] = field.default is dataclasses.MISSING
        action = parser.add_argument(_flag(field.name), dest=field.name, **settings)
    if kind is Path:  # shtab reads this attribute
        action.complete = FOLDERS if action.metavar == "DIR" else FILES  # type: ignore[attr-defined]


def _flag(name: str) -> str:
    """How a field is passed: `--top-k` for top_k, `--run` for run_."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def name_the_option(problem: str) -> str:
    """Let a message that begins with the name of a field begin with the option: "--top-k 0 ..." for "top_k 0 ..."."""
    name, _, rest = problem.partition(" ")
    return f"{_flag(name)} {rest}"


def _kind(hint: Any) -> Any:
    """The type of one value: int for `int`, `int | None` and `tuple[int, ...]`."""
    parts = () if get_origin(hint) is Literal else get_args(hint)
    return _kind(next(part for part in parts if part is not NoneType)) if parts else hint


# ---- The parser ------------------------------------------------------------------------------------------------------


class Help(argparse.HelpFormatter):
    """Wrap paragraphs to the terminal; print a text with line breaks, such as the examples, as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors also suggest what was probably meant."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, **settings})
        self._commands: tuple[str, ...] = ()
        self._typed: list[str] = []

    def add_commands(self, commands: Sequence[type[Command]]) -> None:
        """Add subcommands, in the order in which the help lists them."""
        parsers = self.add_subparsers(metavar="COMMAND", title="commands")
        for command in commands:
            command.add_parser(parsers)
        self._commands = tuple(command.command for command in commands)

    def parse_command(self, argv: Sequence[str] | None = None) -> Command | None:
        """Parse the command line into a command; None if no subcommand was typed.

        Args:
            argv: the words after the program's name; None for those of this process.

        Raises:
            SystemExit: after help or the version (0), and if the arguments are wrong (2).
        """
        arguments = self.parse_args(argv)
        command: type[Command] | None = getattr(arguments, "command", None)
        return command.parsed(arguments) if command else None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and report an unknown argument here, where the options of its subcommand are known."""
        # `error` needs the words that were typed
        self._typed = list(sys.argv[1:] if args is None else args)
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Print usage, the message and suggestions to standard error, and exit with status 2."""
        hints = "".join(f" Did you mean {name} instead of {word}?" for word, name in self._suggestions())
        super().error(f"{message}.{hints}" if hints else message)

    def _suggestions(self) -> Iterator[tuple[str, str]]:
        """Yield each misspelled option or command, with the name that it resembles."""
        from difflib import get_close_matches

        options = tuple(self._option_string_actions)
        typed = [word.partition("=")[0] for word in self._typed if word.startswith("-")]
        wrong = [(word, options) for word in typed if not any(option.startswith(word) for option in options)]
        command = next((word for word in self._typed if not word.startswith("-")), "")
        if command not in self._commands:
            wrong.append((command, self._commands))
        for word, names in wrong:
            for name in get_close_matches(word.lower(), names, 1, cutoff=0.65):
                if word.startswith("--no-") == name.startswith("--no-"):  # never suggest the opposite
                    yield word, name
