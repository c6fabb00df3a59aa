"""`pipelib plots-page`: a page for DVC's plots that needs no network."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipelib.cli.command import Command
from pipelib.errors import UserError

EXAMPLES = """examples:
  pipelib plots-page                  write the page, as make setup has done
  dvc plots show                      draw the curves on it
"""
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


@dataclass(frozen=True)
class PlotsPage(Command):
    """Write the page, and tell DVC."""

    command = "plots-page"
    help = "let dvc plots draw without a network"
    description = f"Write {DVC / PAGE} and make it this clone's page of `dvc plots`; `make setup` does it."
    examples = EXAMPLES

    def run(self) -> int:
        """Write the page, and set DVC's option.

        Raises:
            UserError: this is not the root of a repository of DVC, or DVC fails.
        """
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
