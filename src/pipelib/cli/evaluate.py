"""`pipelib evaluate`: measure a model in a Hugging Face folder, outside the pipeline."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipelib.cli.command import Command, option
from pipelib.errors import UserError

if TYPE_CHECKING:
    from pipelib.evaluation.params import EvaluateParams

EXAMPLES = """examples:
  pipelib evaluate --model models
  pipelib evaluate --model ../gpt2 --tasks hellaswag piqa --limit 200
  pipelib evaluate --model data/models/gpt2 --out report    the report, the numbers and every item
  pipelib evaluate --model ./mine --baselines ./yours       two models in one table
"""


@dataclass(frozen=True)
class Evaluate(Command):
    """Measure a model."""

    command = "evaluate"
    help = "measure any model in a Hugging Face folder"
    description = (
        "Run the measurements of the evaluate stage: the loss on the validation shard in data/tokens, the four-way benchmarks, "
        "and the lm-eval tasks whose data is in data/benchmarks. Options that are not given come from section evaluate of "
        "params.yaml. The pipeline's outs and metrics do not change."
    )
    examples = EXAMPLES

    model: Path = option("the model, a Hugging Face folder", metavar="DIR")
    tasks: tuple[str, ...] | None = option("lm-eval tasks", default=None, nargs="*", metavar="NAME")
    limit: int | None = option("examples per task, from its start", default=None, metavar="N")
    baselines: tuple[str, ...] = option(
        "models to compare with: gpt2, ..., or folders; default: none", default=(), nargs="*", metavar="NAME"
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = option("precision of matrix products", default=None)
    out: Path | None = option("write evaluation.md, .html, .json and items.npz to DIR", default=None, metavar="DIR")

    def run(self) -> int:
        """Measure, print a table, and write the files of --out.

        Raises:
            UserError: an argument is wrong, or there is nothing to measure.
        """
        params = self._params()  # before torch is imported

        from pipelib.cli.table import print_table
        from pipelib.evaluation.report import rows_of
        from pipelib.inspection.folder_evaluation import evaluate_folder

        subject = evaluate_folder(self.model, params, self.out)
        print_table([[cell.replace("*", "") for cell in row[:4]] for row in rows_of(subject)], header=False)
        if self.out:
            print(f"\nwritten: {self.out}/evaluation.md, evaluation.html, evaluation.json, items.npz")
        return 0

    def _params(self) -> "EvaluateParams":
        """Section evaluate of params.yaml, overridden by the options.

        Raises:
            UserError: a task or baseline is unknown, or the limit is below 1.
        """
        from pipelib.params import load_params

        params = replace(load_params().evaluate, baselines=self.baselines)
        if self.tasks is not None:
            params = replace(params, tasks=self.tasks)
        if self.limit is not None:
            if self.limit < 1:
                raise UserError(f"--limit {self.limit} would score nothing; give 1 or more.")
            params = replace(params, task_limit=self.limit)
        if self.precision is not None:
            params = replace(params, precision=self.precision)
        if problems := list(params.problems()):
            raise UserError("\n".join(f"--{problem}" for problem in problems))
        return params
