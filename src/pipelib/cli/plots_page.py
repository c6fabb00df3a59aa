"""`pipelib plots-page`: a page for DVC's plots that needs no network."""

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelib.errors import UserError

DVC = Path(".dvc")
PAGE = "plots/page.html"
"""Seen from DVC, as its option plots.html_template."""

HTML = """<!DOCTYPE html>
<!-- The page of `dvc plots show` and `dvc plots diff`, made by `pipelib plots-page`. DVC's own page loads its scripts from a
     server; here Vega, Vega-Lite and Vega-Embed (BSD-3-Clause, University of Washington Interactive Data Lab) are part of the
     page, as the package vl-convert-python {version} brings them. -->
<html lang="en">
<head>
<meta charset="utf-8">
{{refresh_tag}}
<title>Curves</title>
<style>
  body {{ font-family: sans-serif; margin: 1.5em; display: flex; flex-wrap: wrap; gap: 1.5em; }}
</style>
<script>
{{
{scripts}
}}
</script>
</head>
<body>
{{plot_divs}}
</body>
</html>
"""
"""The doubled braces are DVC's placeholders; its {scripts}, links to the server, is left out."""

EMBED = """
// A plot without data, as HellaSwag's of a run that did not measure it, is left out; and no menu leads to a server.
window.vegaEmbed = (where, spec) =>
  spec.data ? vegaEmbed(where, spec, {actions: {export: true, source: false, compiled: false, editor: false}})
            : document.querySelector(where).remove();
"""


def add_parser(subparsers: Any) -> None:
    """Add `plots-page` to the command."""
    parser = subparsers.add_parser(
        "plots-page",
        help="let dvc plots draw without a network",
        description=f"Write {DVC / PAGE} and make it this clone's page of `dvc plots`; `make setup` does it.",
    )
    parser.set_defaults(run=run)


def run(_arguments: argparse.Namespace) -> int:
    """Write the page, and tell DVC."""
    from pipelib.files import format_bytes, write_text
    from pipelib.workspace.dvc import run_dvc

    if not DVC.is_dir():
        raise UserError(f"{DVC}/ is not there, so there is nothing to set up; run this in the repository's root.")
    page = make_page()
    write_text(DVC / PAGE, page)
    run_dvc(Path(), "config", "--local", "plots.html_template", PAGE)
    print(f"{DVC / PAGE}: {format_bytes(len(page.encode()))}; dvc plots needs no network")
    return 0


def make_page() -> str:
    """The template of DVC's page, about 0.9 MB of it the scripts."""
    import vl_convert

    specification = [name for name in vl_convert.get_vegalite_versions() if name.startswith("5.")][-1]
    scripts = vl_convert.javascript_bundle(EMBED, vl_version=specification)
    return HTML.format(version=version("vl-convert-python"), scripts=scripts)
