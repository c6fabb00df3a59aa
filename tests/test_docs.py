"""The documents are true: links lead somewhere, commands exist, and every parameter, command and message is in them.

`python tests/test_docs.py` writes the parts of the documents that follow from the code: the table of parameters in
docs/reference.md and the messages in docs/how-to/troubleshooting.md.
"""

import ast
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
TROUBLESHOOTING = ROOT / "docs/how-to/troubleshooting.md"


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


def test_what_follows_from_the_code_is_written_down() -> None:
    for page, (start, end, content) in generated().items():
        text = page.read_text(encoding="utf-8")
        assert text.count(start) == text.count(end) == 1
        between = text.partition(start)[2].partition(end)[0]
        assert between == content, f"{name_of(page)} is not what the code says; run python tests/test_docs.py"


def generated() -> dict[Path, tuple[str, str, str]]:
    """(from, to, what stands between) of each page with a part that follows from the code."""
    end = "<!-- end -->"
    return {
        REFERENCE: ("<!-- parameters: python tests/test_docs.py -->\n", end, parameters()),
        TROUBLESHOOTING: ("<!-- messages: python tests/test_docs.py -->\n", end, messages()),
    }


def parameters() -> str:
    """The table of all parameters: what params.yaml says of each."""
    lines, section, rows = (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines(), "", []
    for line in lines:
        if head := re.match(r"^([a-z_]+):", line):
            section = head[1]
        elif key := re.match(r"^  ([a-z0-9_]+): *([^#]*?) *(?:# (.*))?$", line):
            rows.append([f"{section}.{key[1]}", key[2] or "a list", key[3] or ""])
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


def messages() -> str:
    """Every message for the user, by the part of the program that prints it; what varies is an ellipsis."""
    parts: list[str] = []
    for path in sorted((ROOT / "src/pipelib").rglob("*.py")) + sorted((ROOT / "stages").glob("*.py")):
        found = list(dict.fromkeys(messages_in(path)))
        if found:
            parts += [f"### {path.relative_to(ROOT).as_posix().removeprefix('src/pipelib/')}", ""]
            parts += [f"- {text}" for text in found] + [""]
    return "\n" + "\n".join(parts)


def test_messages_are_found_however_they_reach_the_user() -> None:
    text = messages()
    for said in (
        "the disk is full (…), so the stage stopped",
        "another program keeps it locked: end that, or wait",
        "holds unfinished work of other code",
        "the machines of this training did not find each other (…)",
        "MLflow refuses a part of this run",
        "did not take all of this run within",
        "is missing, so the folder is not complete",
        "… has md5 … and DVC recorded …: its bytes changed; add --repair",
    ):
        assert said in text


RETURNED = ("user_message", "_other_code", "_failure", "advice")
"""Functions whose texts others raise or print."""


def messages_in(path: Path) -> Iterator[str]:
    """The texts of a file for the user: of UserError, SystemExit and `say`, problems with parameters and outs, and what
    functions return that make a message."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = assigned(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if called in ("UserError", "SystemExit", "say", "_complain") or (
                called == "append" and owner == "problems"
            ):
                yield from readable(node.args[0], names)
            elif called == "Problem":
                yield from readable(node.args[1], names)
        elif isinstance(node, ast.FunctionDef) and "problems" in node.name:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Yield) and inner.value is not None:
                    yield from readable(inner.value, names)
        elif isinstance(node, ast.FunctionDef) and node.name in RETURNED:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return) and inner.value is not None:
                    yield from readable(inner.value, names)
                elif isinstance(inner, ast.Tuple) and all(isinstance(part, ast.Constant) for part in inner.elts):
                    yield from readable(inner.elts[-1], names)  # what an error says, and what to do


Names = dict[str, list[tuple[range, ast.expr]]]
"""What names stand for, and in which lines."""


def assigned(tree: ast.Module) -> Names:
    """The values that a file gives to names, each known until its block ends."""
    names: Names = {}
    for node in ast.walk(tree):
        for block in (getattr(node, field, None) for field in ("body", "orelse", "finalbody")):
            for statement in block if isinstance(block, list) else ():
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                    lines = range(statement.lineno + 1, block[-1].end_lineno + 1)
                    names.setdefault(statement.targets[0].id, []).append((lines, statement.value))
    return names


def readable(node: ast.expr, names: Names) -> Iterator[str]:
    text = re.sub(r"(…\s*)+…", "…", literal(node, names).replace("\n", " ")).strip()
    if len(re.sub(r"[…\W]", "", text)) > 15:
        yield text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def literal(node: ast.expr, names: Names) -> str:
    """The text of an expression, with an ellipsis for what is not literal."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
        return literal(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left, names) + literal(node.right, names)
    if isinstance(node, ast.Name):
        known = [(lines.start, value) for lines, value in names.get(node.id, ()) if node.lineno in lines]
        value = max(known, key=lambda found: found[0])[1] if known else None
        if isinstance(value, ast.JoinedStr) or isinstance(getattr(value, "value", None), str):
            return literal(value, names)
    return "…"


if __name__ == "__main__":
    for page, (start, end, content) in generated().items():
        before, _, rest = page.read_text(encoding="utf-8").partition(start)
        page.write_text(before + start + content + end + rest.partition(end)[2], encoding="utf-8")
