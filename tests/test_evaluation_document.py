"""The report's two forms say the same, whatever a model writes into them."""

import base64
from pathlib import Path

import pytest

from pipelib.evaluation.document import Heading, Paragraph, Picture, Table, Text, to_html, to_markdown


def test_html_is_the_markdown_and_needs_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"another")
    page = to_html(
        "A <title>",
        [
            Heading("Scores of `x`", 1),
            Paragraph("It is **good**: val_loss & co < 1."),
            Table(("what", "value"), [("a|b", "`c`"), ("<b>", "1")]),
            Picture(tmp_path / "loss.png", "The loss"),
        ],
    )
    assert "<title>A &lt;title&gt;</title>" in page
    assert "<h1>Scores of <code>x</code></h1>" in page
    assert "<p>It is <strong>good</strong>: val_loss &amp; co &lt; 1.</p>" in page
    assert "<td>a|b</td>" in page
    assert "<td><code>c</code></td>" in page
    assert "<td>&lt;b&gt;</td>" in page
    data = base64.b64encode(b"another").decode()
    assert f'<img src="data:image/png;base64,{data}" alt="The loss"' in page
    assert "loss.png" not in page


@pytest.mark.parametrize(
    "text", ["plain", "<script>alert(1)</script>", "````\n# no heading", "``````", "a\n\n| b |\n|---|"]
)
def test_a_text_stays_as_it_is(text: str) -> None:
    page = to_html("T", [Text(text), Paragraph("after")])
    assert page.count("<pre>") == 1
    assert "<script>" not in page
    assert "<h1>" not in page
    assert "<table>" not in page
    assert page.index("</pre>") < page.index("<p>after</p>")
    assert f"{text}\n" in to_markdown([Text(text)])
