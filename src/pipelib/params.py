"""The whole of params.yaml, read strictly before any work.

Stages do not depend on this file (see `provenance.EXEMPT`): it accepts or refuses, and hands each stage the section that
the stage's own wing declares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelib.config import ParamsError, PositiveInt, parse, read_yaml
from pipelib.corpus.params import DownloadParams
from pipelib.evaluation.params import EvaluateParams
from pipelib.model.params import ModelParams
from pipelib.tokens.params import TokenizeParams
from pipelib.training.params import TrainParams

PARAMS_FILE = Path("params.yaml")


@dataclass(frozen=True)
class LoggingParams:
    """Section `logging` of params.yaml: what may change without changing any result. No stage depends on it."""

    log_every: PositiveInt
    """Steps between lines of progress and points sent to MLflow."""
    checkpoint_every: PositiveInt
    """Steps between checkpoints."""
    mlflow: bool
    """Mirror the record to MLflow."""


@dataclass(frozen=True)
class Params:
    """Every section of params.yaml."""

    download: DownloadParams
    tokenize: TokenizeParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    logging: LoggingParams

    def problems(self) -> Iterator[str]:
        """What does not go together across sections."""
        if self.train.sequence_length > self.model.context_length:
            yield (
                f"train.sequence_length: {self.train.sequence_length} is longer than model.context_length = "
                f"{self.model.context_length}, so positions would be missing; lower it or raise the context."
            )
        if self.tokenize.shard_tokens <= self.train.sequence_length:
            yield (
                f"tokenize.shard_tokens: {self.tokenize.shard_tokens} leaves no whole sequence of "
                f"train.sequence_length = {self.train.sequence_length} in the validation shard; raise it."
            )
        for task, benchmark in (("completion", "completion"), ("heldout", "completion")):
            if task in self.evaluate.tasks and benchmark not in self.download.benchmarks:
                yield (
                    f"evaluate.tasks: {task} needs data that download makes for the benchmark {benchmark}, which is not in "
                    f"download.benchmarks; add it there, or drop the task."
                )
        if self.evaluate.batch_tokens < self.model.context_length:
            yield (
                f"evaluate.batch_tokens: {self.evaluate.batch_tokens} is less than one context of "
                f"{self.model.context_length} tokens (model.context_length); raise it."
            )


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check a parameter file.

    Raises:
        ParamsError: with every problem of the file.
        UserError: the file is missing or not YAML.
    """
    problems: list[str] = []
    params = parse(Params, read_yaml(path), "", problems)
    if params is None:
        raise ParamsError(path, problems)
    return params
