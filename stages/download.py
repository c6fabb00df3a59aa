"""Stage download: text to data/raw, evaluation sets to data/benchmarks, published models to data/models.

Run it as `python -m stages.download`, from the root of the checkout.
"""

if not __package__:
    raise SystemExit(
        "stages/download.py was run by its path, so Python would import stages/tokenize.py instead of its own tokenize; "
        "run: python -m stages.download"
    )

from pipelib.corpus.download import chosen_source, download, download_inputs
from pipelib.corpus.experiment_copy import require_corpus
from pipelib.params import load_params
from pipelib.stage import Build, WorkResult, build_outs, parser, run_stage


def main() -> None:
    """Download or build the corpus that `params.download` names, with its benchmarks and models."""
    parser("download", __doc__).parse_args()
    params = load_params()
    require_corpus(params.download)
    source = chosen_source(params.download)

    def work(build: Build) -> WorkResult:
        return download(params.download, source, build.outs, build.work)

    build_outs("download", params, inputs=download_inputs(params.download, source), work=work)


if __name__ == "__main__":
    run_stage("download", main)
