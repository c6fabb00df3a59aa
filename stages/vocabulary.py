"""vocabulary: data/raw -> data/vocabulary: GPT-2's vocabulary, one trained on the corpus, or that of a folder."""

if not __package__:
    raise SystemExit(
        "stages/vocabulary.py was run by its path, so Python would import stages/tokenize.py instead of its own `tokenize` "
        "and fail later; run it as a module from the root of the checkout: python -m stages.vocabulary"
    )

from pathlib import Path

from pipelib.corpus.experiment_copy import require_corpus
from pipelib.corpus.raw import benchmark_documents
from pipelib.files import sha256_file
from pipelib.params import load_params
from pipelib.stage import Build, WorkResult, build_outs, parser, run_stage
from pipelib.vocabulary.folder import TOKENIZER, read_tokenizer
from pipelib.workspace.places import HERE, MANIFEST

RAW = HERE.raw


def main() -> None:
    """Make the vocabulary, or link the one made earlier from the same text with the same parameters."""
    parser("vocabulary", __doc__).parse_args()
    params = load_params()
    require_corpus(params.download)
    documents = benchmark_documents(HERE.benchmarks)
    inputs: dict[str, object] = {"vocabulary": params.vocabulary.decides()}
    if params.vocabulary.source != "gpt2":
        inputs |= {"raw": sha256_file(RAW / MANIFEST), "benchmark_documents": documents}
    if params.vocabulary.folder:
        folder = Path(params.vocabulary.folder)
        end = read_tokenizer(folder).end_token_id  # if there is no vocabulary, the error says so
        inputs |= {"folder": sha256_file(folder / TOKENIZER), "end": end}

    def work(build: Build) -> WorkResult:
        from pipelib.vocabulary.build import make_vocabulary  # not needed to link finished outs

        return make_vocabulary(build, params.vocabulary, RAW, documents)

    build_outs("vocabulary", params, inputs, work)


if __name__ == "__main__":
    run_stage("vocabulary", main)
