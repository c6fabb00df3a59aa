"""tokenize: data/raw/*.parquet -> data/tokens/*.bin and manifest.json: GPT-2 tokens in shards, validation first."""

if not __package__:
    raise SystemExit(
        "stages/tokenize.py was run by its path, so Python would take it for its own `tokenize` and fail later on; "
        "run it as a module from the root of the checkout: python -m stages.tokenize"
    )

from dataclasses import asdict
from pathlib import Path

from pipelib.files import read_json, sha256_file
from pipelib.params import load_params
from pipelib.stage import build_outs, run_stage
from pipelib.tokens.encode_corpus import encode_corpus
from pipelib.tokens.shards import MANIFEST

RAW = Path("data/raw")


def main() -> None:
    """Encode the corpus, or link the shards made earlier from the same text."""
    params = load_params()
    read_json(RAW / MANIFEST)  # says what to run where it is missing
    documents = params.download.benchmark_documents
    inputs = {
        "tokenize": asdict(params.tokenize),
        "raw": sha256_file(RAW / MANIFEST),
        "benchmark_documents": documents,
    }
    build_outs("tokenize", params, inputs, lambda build: encode_corpus(build, RAW, params.tokenize, documents))


if __name__ == "__main__":
    run_stage("tokenize", main)
