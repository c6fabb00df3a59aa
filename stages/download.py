"""Stage download: text into data/raw, evaluation sets into data/benchmarks, published models into data/models.

Run as `python -m stages.download`, from the root of the checkout.
"""

if not __package__:
    raise SystemExit(
        "stages/download.py was run by its path, so Python would take stages/tokenize.py for its own tokenize; "
        "run: python -m stages.download"
    )

from collections.abc import Mapping

from pipelib.corpus.download import download, download_inputs, source
from pipelib.corpus.experiment_copy import require_corpus
from pipelib.params import load_params
from pipelib.stage import Build, build_outs, run_stage


def main() -> None:
    """Fetch or make the corpus that `params.download` names, and the benchmarks and models with it."""
    params = load_params()
    require_corpus(params.download)
    origin = source(params.download)

    def work(build: Build) -> tuple[Mapping[str, object], Mapping[str, object]]:
        return download(params.download, origin, build.outs, build.work)

    build_outs("download", params, inputs=download_inputs(params.download, origin), work=work)


if __name__ == "__main__":
    run_stage("download", main)
