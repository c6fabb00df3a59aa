"""train: data/tokens -> models/ (a Hugging Face folder) and curves/ (losses of every step, samples).

`--join` adds the ranks of this machine to a training run on another one: see docs/how-to/several-machines.md.
"""

if not __package__:
    raise SystemExit(
        "stages/train.py was run by its path, so Python would import stages/tokenize.py instead of its own `tokenize` "
        "and fail later; run it as a module from the root of the checkout: python -m stages.train"
    )

import os

from pipelib.corpus.experiment_copy import require_corpus
from pipelib.params import Params, load_params
from pipelib.schema import flatten
from pipelib.stage import Build, WorkResult, build_outs, parser, run_stage
from pipelib.tokens.shards import read_manifest
from pipelib.training.inputs import InitialWeights, find_initial_weights, require_hellaswag
from pipelib.workspace.places import HERE
from pipelib.workspace.provenance import code_hashes
from pipelib.workspace.workdir import WorkDir

TOKENS, BENCHMARKS = HERE.tokens, HERE.benchmarks


def main() -> None:
    """Train, resume training, or link the model trained earlier from the same data with the same parameters."""
    options = parser("train", __doc__)
    options.add_argument("--join", action="store_true", help="join a training run that another machine has started")
    arguments, params = options.parse_args(), load_params()
    require_corpus(params.download)
    # Before torch is imported: when a machine dies, its C++ warnings are pages of frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if arguments.join:
        from pipelib.training.launch.launch import join

        code = code_hashes("train", dict(flatten(params)))
        join(lambda: WorkDir("train", inputs(params, find_initial_weights(params.model)), code))
        return
    initial = find_initial_weights(params.model)

    def work(build: Build) -> WorkResult:
        # imports torch, which takes seconds and is not needed to link finished outs
        from pipelib.training.pretraining import pretrain
        from pipelib.training.schedule import Cadence

        cadence = Cadence(params.logging.log_every, params.logging.checkpoint_every)
        return pretrain(
            build, params.model, params.train, cadence, TOKENS, BENCHMARKS, initial, inputs(params, initial)
        )

    build_outs("train", params, inputs(params, initial), work)


def inputs(params: Params, initial: InitialWeights) -> dict[str, object]:
    """Return everything that decides the result."""
    return {
        "model": params.model.decides(),
        "train": params.train.decides(),
        "initial weights": initial.sha256,
        "data": read_manifest(TOKENS).fingerprint,
        **require_hellaswag(params.train, BENCHMARKS),
    }


if __name__ == "__main__":
    run_stage("train", main)
