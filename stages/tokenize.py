"""tokenize: data/raw/*.parquet -> data/tokens/*.bin and manifest.json: tokens in shards, validation first.

`python -m stages.tokenize --share i/n` only encodes share i of n of the text. Several machines that share the state
folder can encode one share each. The stage itself then only writes the shards.
"""

if not __package__:
    raise SystemExit(
        "stages/tokenize.py was run by its path, so Python would import it instead of its own `tokenize` and fail later; "
        "run it as a module from the root of the checkout: python -m stages.tokenize"
    )

from dataclasses import asdict

from pipelib.corpus.experiment_copy import require_corpus
from pipelib.corpus.raw import benchmark_documents, read_raw_manifest
from pipelib.errors import tell
from pipelib.files import sha256_file
from pipelib.params import Params, load_params
from pipelib.schema import flatten
from pipelib.stage import Build, WorkResult, build_outs, parser, run_stage
from pipelib.vocabulary.choice import read_vocabulary
from pipelib.workspace.places import HERE, MANIFEST
from pipelib.workspace.provenance import code_hashes

RAW = HERE.raw


def main() -> None:
    """Encode the corpus, or link the shards made earlier from the same text. With --share, encode one share only."""
    options = parser("tokenize", __doc__)
    options.add_argument(
        "--share", metavar="i/n", help="encode only share i of n (i from 0 to n - 1), for a later run of the stage"
    )
    arguments = options.parse_args()
    params = load_params()
    require_corpus(params.download)
    read_raw_manifest(RAW)  # if it is missing, the error says what to run
    if arguments.share is not None:
        encode_share(arguments.share, params)
        return
    documents, vocabulary = benchmark_documents(HERE.benchmarks), read_vocabulary()
    inputs: dict[str, object] = {
        "tokenize": asdict(params.tokenize),
        "raw": sha256_file(RAW / MANIFEST),
        "benchmark_documents": documents,  # too many of them for the validation shard are refused
    }
    if vocabulary.validation_documents is not None:  # GPT-2's is left out, as before there were others
        inputs |= {
            "vocabulary": vocabulary.tokenizer.fingerprint,
            "validation_documents": vocabulary.validation_documents,
        }

    def work(build: Build) -> WorkResult:
        from pipelib.tokens.encode_corpus import encode_corpus  # not needed to link finished outs

        return encode_corpus(build, RAW, params.tokenize, documents, vocabulary)

    build_outs("tokenize", params, inputs, work)


def encode_share(text: str, params: Params) -> None:
    """Encode the share `i/n` of the text, for a later run of the stage."""
    from pipelib.tokens import encode_corpus
    from pipelib.tokens.unit_store import Share

    share = Share.parse(text)
    code = code_hashes("tokenize", dict(flatten(params)))
    count = encode_corpus.encode_share(code, RAW, share, read_vocabulary().tokenizer)
    tell(f"tokenize: share {text} is complete: {count} units")


if __name__ == "__main__":
    run_stage("tokenize", main)
