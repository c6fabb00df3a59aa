"""`pipelib plots-page`: write a template for DVC's plots that needs no network."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipelib.cli.command import Command
from pipelib.errors import UserError

EXAMPLES = """examples:
  pipelib plots-page                  write the template, as make setup does
  dvc plots show                      draw the curves with it
"""
DVC = Path(".dvc")
PAGE = "plots/page.html"
"""Relative to .dvc/, as DVC's option plots.html_template needs it."""

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
"""Doubled braces become DVC's placeholders. DVC's own {scripts} links to a server, so it is left out."""

EMBED = """
// A plot without data, as HellaSwag's of a run that did not measure it, is left out; and no menu leads to a server.
window.vegaEmbed = (where, spec) =>
  spec.data ? vegaEmbed(where, spec, {actions: {export: true, source: false, compiled: false, editor: false}})
            : document.querySelector(where).remove();
"""


@dataclass(frozen=True)
class PlotsPage(Command):
    """Write the template, and point DVC to it."""

    command = "plots-page"
    help = "make dvc plots work without a network"
    description = f"Write {DVC / PAGE}, the template that `dvc plots` uses in this clone. `make setup` does it."
    examples = EXAMPLES

    def run(self) -> int:
        """Write the template, and set DVC's option.

        Raises:
            UserError: this is not the root of a DVC repository, or DVC fails.
        """
        from pipelib.files import format_bytes, write_text
        from pipelib.workspace.dvc import run_dvc

        if not DVC.is_dir():
            raise UserError(
                f"{DVC}/ does not exist, so there is nothing to set up; run this in the root of the repository."
            )
        page = make_page()
        write_text(DVC / PAGE, page)
        run_dvc(Path(), "config", "--local", "plots.html_template", PAGE)
        print(f"{DVC / PAGE}: {format_bytes(len(page.encode()))}; dvc plots works without a network now")
        return 0


def make_page() -> str:
    """The template, with the scripts in it; about 0.9 MB."""
    import vl_convert

    # DVC's plot templates are written for Vega-Lite 5
    specification = [name for name in vl_convert.get_vegalite_versions() if name.startswith("5.")][-1]
    scripts = vl_convert.javascript_bundle(EMBED, vl_version=specification)
    return HTML.format(version=version("vl-convert-python"), scripts=scripts)
