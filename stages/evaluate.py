"""evaluate: models/ and chat/ -> metrics/evaluate.json and reports/: loss, completion, the lm-eval harness, samples."""

if not __package__:
    raise SystemExit(
        "stages/evaluate.py was run by its path, so Python would import stages/tokenize.py instead of its own `tokenize` "
        "and fail later; run it as a module from the root of the checkout: python -m stages.evaluate"
    )

from pipelib.corpus.experiment_copy import require_corpus
from pipelib.evaluation.inputs import evaluation_inputs
from pipelib.params import load_params
from pipelib.stage import Build, WorkResult, build_outs, parser, run_stage
from pipelib.workspace.places import HERE

FOLDERS = HERE.model, HERE.tokens, HERE.benchmarks, HERE.curves, HERE.chat


def main() -> None:
    """Evaluate the model, or link an earlier evaluation of the same model with the same parameters."""
    parser("evaluate", __doc__).parse_args()
    params = load_params()
    require_corpus(params.download)
    require_corpus(params.finetune, "finetune")

    def work(build: Build) -> WorkResult:
        from pipelib.evaluation.evaluate import evaluate  # takes seconds, and is not needed to link finished outs

        return evaluate(build, params.evaluate, *FOLDERS)

    build_outs("evaluate", params, evaluation_inputs(params.evaluate, *FOLDERS), work)


if __name__ == "__main__":
    run_stage("evaluate", main)
