"""The documents are true: links lead somewhere, commands exist, and every parameter, command and variable is in them.

`python tests/test_docs.py` writes the part of the documents that follows from the code: the table of parameters in
docs/reference.md.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "corpus/*.md")
    for path in ROOT.glob(pattern)
    if "log" not in path.stem  # what was tried, with the commands of its day
)
REFERENCE = ROOT / "docs/reference.md"
START, END = "<!-- parameters: python tests/test_docs.py -->\n", "<!-- end -->"
"""The lines around the table of parameters in the reference."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- Links -----------------------------------------------------------------------------------------------------------


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{name_of(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)}: {name_of(linked)} has no heading #{anchor}"


def test_the_glossary_names_files_that_exist() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| ")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    assert len(named) > 40
    for name in named:
        assert any((root / name).exists() for root in (ROOT, ROOT / "src/pipelib")), f"docs/glossary.md names {name}"


# ---- Commands --------------------------------------------------------------------------------------------------------


def commands_of(page: Path) -> Iterator[list[str]]:
    """Every command of ours, of DVC and of make in blocks of a shell and in `code`, as words."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:console|bash|sh)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    typed = [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    typed += [line for block in blocks if "$ " not in block for line in block.splitlines()]
    typed += re.findall(r"`([^`\n]+)`", without_blocks(text))
    for line in typed:
        for part in re.split(r"&&|;|\||\d?>", re.sub(r"\s#\s.*", "", line)):
            try:
                words = shlex.split(part)
            except ValueError:
                continue
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("srun", "time", "nohup")):
                words = words[1:]
            if words and words[0].removeprefix(".venv/bin/") in ("pipelib", "dvc", "make", "python"):
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def is_example(word: str) -> bool:
    """Whether a word stands for something else: FOLDER, [--repair], ..."""
    return word.startswith(("[", "<")) or word.isupper() or "..." in word


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelib.cli.main import make_parser

    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for program, *words in commands_of(page):
        said = f"{name_of(page)}: {program} {' '.join(words)}"
        words = [word for word in words if not is_example(word) or word.startswith("--")]
        if program == "make":
            wanted = [word for word in words if "=" not in word and not word.startswith("-")]
            assert set(wanted) <= targets, f"{said}: no such target"
        elif program == "python" and words[:1] == ["-m"] and words[1:] and re.match(r"stages\.[a-z]", words[1]):
            assert (ROOT / words[1].replace(".", "/")).with_suffix(".py").is_file(), said
        elif program == "pipelib" and words:
            assert known_options(make_parser(), words) is None, f"{said}: {known_options(make_parser(), words)}"
        elif program == "dvc" and words:
            from dvc.cli.parser import get_main_parser

            assert known_options(get_main_parser(), words) is None, f"{said}: {known_options(get_main_parser(), words)}"
    capsys.readouterr()


def known_options(parser: object, words: list[str]) -> str | None:
    """What of a command a parser does not know: a subcommand or an option; None where it knows all of them."""
    import argparse

    assert isinstance(parser, argparse.ArgumentParser)
    for number, word in enumerate(words):
        choices = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if choices is not None and not word.startswith("-"):
            if word not in choices:
                return f"no command {word}"
            return known_options(choices[word], words[number + 1 :])
        option = word.partition("=")[0]
        if word.startswith("-") and word != "-" and option not in parser._option_string_actions:
            return f"no option {option}"
    return None


# ---- Completeness ----------------------------------------------------------------------------------------------------


def test_every_option_of_a_command_is_in_its_rows_of_the_reference_or_on_a_page_that_it_names() -> None:
    from pipelib.cli.main import make_parser

    rows = REFERENCE.read_text(encoding="utf-8").splitlines()
    subparsers = next(a for a in make_parser()._actions if a.metavar == "COMMAND")
    assert isinstance(subparsers.choices, dict)
    for command, parser in subparsers.choices.items():
        row = "\n".join(row for row in rows if row.startswith(f"| `pipelib {command}"))
        pages = [REFERENCE.parent / link for link in re.findall(r"\]\((how-to/[\w-]+\.md)", row)]
        text = "\n".join([row, *(page.read_text(encoding="utf-8") for page in pages)])
        for option in (name for action in parser._actions for name in action.option_strings if name.startswith("--")):
            assert option == "--help" or option in text, f"docs/reference.md lacks {option} of pipelib {command}"


def test_every_command_and_target_is_in_the_reference() -> None:
    from pipelib.cli.main import make_parser

    text = REFERENCE.read_text(encoding="utf-8")
    subparsers = next(a for a in make_parser()._actions if a.dest == "command" or a.metavar == "COMMAND")
    assert isinstance(subparsers.choices, dict)
    for command in subparsers.choices:
        assert f"`pipelib {command}" in text, f"docs/reference.md lacks pipelib {command}"
    for target in re.findall(r"^([a-z][a-z-]*):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE):
        assert re.search(rf"`(make )?{target}[ `\[]", text), f"docs/reference.md lacks make {target}"


def test_every_variable_of_ours_is_in_the_reference() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    internal = {"PIPELIB_PARENT"}  # set by us, read by us
    for path in sorted((ROOT / "src").rglob("*.py")):
        for name in set(re.findall(r"PIPELIB_[A-Z_]+", path.read_text(encoding="utf-8"))) - internal:
            assert f"`{name}`" in text, f"docs/reference.md lacks {name} of {name_of(path)}"


def test_the_table_of_parameters_is_what_params_yaml_says() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    between = text.partition(START)[2].partition(END)[0]
    assert between == parameters(), f"{name_of(REFERENCE)} is not what params.yaml says; run python tests/test_docs.py"


def parameters() -> str:
    """The table of all parameters: what params.yaml says of each."""
    lines, section, rows = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines(), "", []
    for line in lines:
        if head := re.match(r"^([a-z_]+):", line):
            section = head[1]
        elif key := re.match(r"^  ([a-z0-9_]+): *([^#]*?) *(?:# (.*))?$", line):
            outer = [f"{section}.{key[1]}", key[2] or "a list", key[3] or ""]
            rows.append(outer)
        elif key := re.match(r"^    ([a-z0-9_]+): *([^#]*?) *(?:# (.*))?$", line):
            outer[1] = "keys"
            rows.append([f"{outer[0]}.{key[1]}", key[2], key[3] or ""])
        elif more := re.match(r"^ {20,}# (.*)$", line):
            rows[-1][2] += f" {more[1]}"
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    table = [f"| `{key}` | `{value}` | {what} |" for key, value, what in cells]
    return "\n".join(["| parameter | offline default | what |", "|---|---|---|", *table]) + "\n"


def test_every_parameter_says_what_it_is() -> None:
    from pipelib.params import load_params
    from pipelib.schema import flatten

    table = parameters()
    for key, _ in flatten(load_params(ROOT / "params.yaml")):
        (row,) = (line for line in table.splitlines() if line.startswith(f"| `{key}` |"))
        assert len(row.split(" | ")[2]) > 8, f"params.yaml does not say what {key} is"


if __name__ == "__main__":
    before, _, rest = REFERENCE.read_text(encoding="utf-8").partition(START)
    REFERENCE.write_text(before + START + parameters() + END + rest.partition(END)[2], encoding="utf-8")
