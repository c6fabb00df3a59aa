"""train: data/tokens -> models/ (a Hugging Face folder) and curves/ (losses of every step, samples)."""

if not __package__:
    raise SystemExit(
        "stages/train.py was run by its path, so Python would take stages/tokenize.py for its own `tokenize` and fail "
        "later on; run it as a module from the root of the checkout: python -m stages.train"
    )

from dataclasses import asdict
from pathlib import Path

from pipelib.params import load_params
from pipelib.stage import build_outs, run_stage
from pipelib.tokens.shards import read_manifest
from pipelib.training.initial_weights import find_initial_weights
from pipelib.training.launch import launch
from pipelib.training.loop import Cadence

TOKENS = Path("data/tokens")


def main() -> None:
    """Train, or go on training, or link the model trained earlier from the same data with the same parameters."""
    params = load_params()
    cadence = Cadence(params.logging.log_every, params.logging.checkpoint_every)
    initial = find_initial_weights(params.model)
    inputs = {
        "model": asdict(params.model),
        "train": asdict(params.train),
        "initial weights": initial.sha256,
        "data": read_manifest(TOKENS).fingerprint,
    }
    build_outs(
        "train", params, inputs, lambda build: launch(build, params.model, params.train, cadence, TOKENS, initial)
    )


if __name__ == "__main__":
    run_stage("train", main)
