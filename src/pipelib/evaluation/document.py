"""A document of headings, paragraphs, tables, pictures and texts, as Markdown or as one self-contained HTML file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FENCE = "````"


@dataclass(frozen=True)
class Heading:
    """A title of a section."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A few sentences, with `code` and **bold** as in Markdown."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a header. Its cells are written like paragraphs."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture in the document's folder."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Text:
    """A text that is shown unchanged."""

    text: str


Block = Heading | Paragraph | Table | Picture | Text


def to_markdown(blocks: Sequence[Block]) -> str:
    """Write the document as Markdown. Pictures have relative paths."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        case Picture(path, caption):
            return f"![{caption}]({path.name})"
        case Text(text):
            runs = re.findall(r"`+", text)
            fence = (
                max(FENCE, *(f"{run}`" for run in runs), key=len) if runs else FENCE
            )  # longer than any fence in the text
            return f"{fence}text\n{text}\n{fence}"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Write the document as HTML that contains its pictures."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(to_markdown(blocks))
    # Replace the paths of pictures by their bytes, so that the file can be sent around on its own.
    for picture in (block for block in blocks if isinstance(block, Picture)):
        data = base64.b64encode(picture.path.read_bytes()).decode("ascii")
        body = body.replace(f'src="{html.escape(picture.path.name)}"', f'src="data:image/png;base64,{data}"')
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
    "th{background:#f4f4f4}img{max-width:100%}pre{background:#f6f6f6;padding:1rem;overflow-x:auto;white-space:pre-wrap}"
)
