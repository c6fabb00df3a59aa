"""finetune: models/ -> chat/: a model that answers, its curves, and a page that shows what was trained."""

if not __package__:
    raise SystemExit(
        "stages/finetune.py was run by its path, so Python would import stages/tokenize.py instead of its own `tokenize` "
        "and fail later; run it as a module from the root of the checkout: python -m stages.finetune"
    )

from pipelib.corpus.experiment_copy import require_corpus
from pipelib.finetuning.sources import chosen_for, finetune_inputs
from pipelib.params import load_params
from pipelib.stage import Build, WorkResult, build_outs, parser, run_stage
from pipelib.tokens.shards import read_manifest
from pipelib.workspace.places import HERE


def main() -> None:
    """Fine-tune, resume it, or link the model made earlier from the same conversations and base with the same parameters."""
    parser("finetune", __doc__).parse_args()
    params = load_params()
    require_corpus(params.download)
    require_corpus(params.finetune, "finetune")
    finetuning = chosen_for(params.finetune, read_manifest(HERE.tokens).source.get("kind", "unknown"))
    inputs = finetune_inputs(finetuning)

    def work(build: Build) -> WorkResult:
        if finetuning.source == "none":
            from pipelib.finetuning.nothing import no_finetuning

            return no_finetuning(build)
        # imports torch, which takes seconds and is not needed to link finished outs
        from pipelib.finetuning.finetune import finetune
        from pipelib.training.schedule import Cadence

        cadence = Cadence(params.logging.log_every, params.logging.checkpoint_every)
        return finetune(build, finetuning, cadence, HERE.tokens, inputs)

    build_outs("finetune", params, inputs, work)


if __name__ == "__main__":
    run_stage("finetune", main)
