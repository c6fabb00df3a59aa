"""Stage download: text into data/raw, evaluation sets into data/benchmarks, published models into data/models.

Run as `python -m stages.download`, from the root of the checkout.
"""

if not __package__:
    raise SystemExit(
        "stages/download.py was run by its path, so Python would take stages/tokenize.py for its own tokenize; "
        "run: python -m stages.download"
    )

from pipelib.corpus.download import chosen_source, download, download_inputs
from pipelib.corpus.experiment_copy import require_corpus
from pipelib.params import load_params
from pipelib.stage import Build, Made, build_outs, run_stage


def main() -> None:
    """Fetch or make the corpus that `params.download` names, and the benchmarks and models with it."""
    params = load_params()
    require_corpus(params.download)
    source = chosen_source(params.download)

    def work(build: Build) -> Made:
        return download(params.download, source, build.outs, build.work)

    build_outs("download", params, inputs=download_inputs(params.download, source), work=work)


if __name__ == "__main__":
    run_stage("download", main)
