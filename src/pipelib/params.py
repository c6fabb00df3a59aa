"""All of params.yaml, read and checked before any work starts.

Stages do not depend on this file (see `provenance.EXEMPT`): it only accepts or refuses the parameters. Each section is
declared in the package that uses it.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelib.corpus.params import DownloadParams
from pipelib.corpus.published_models import PUBLISHED_MODELS, is_downloaded, is_model_folder
from pipelib.evaluation.params import EvaluateParams, benchmark_of, known_tasks
from pipelib.finetuning.params import BASE, FinetuneParams
from pipelib.model.params import RANDOM, InitialisedModelParams, published_params
from pipelib.schema import ParamsError, PositiveInt, parse, read_yaml
from pipelib.tokens.params import TokenizeParams
from pipelib.training.params import TrainParams
from pipelib.vocabulary.params import VocabularyParams
from pipelib.workspace.places import HERE


@dataclass(frozen=True)
class LoggingParams:
    """Section `logging` of params.yaml. It changes no result, so no stage depends on it."""

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
    vocabulary: VocabularyParams
    tokenize: TokenizeParams
    model: InitialisedModelParams
    train: TrainParams
    finetune: FinetuneParams
    evaluate: EvaluateParams
    logging: LoggingParams

    def problems(self) -> Iterator[str]:
        """Yield a message for each combination of values that is invalid across sections."""
        if self.train.sequence_length > self.model.context_length:
            yield (
                f"train.sequence_length: {self.train.sequence_length} is longer than model.context_length = "
                f"{self.model.context_length}, so the model could not read a whole sequence; lower it or raise the context."
            )
        if self.tokenize.shard_tokens != "auto" and self.tokenize.shard_tokens <= self.train.sequence_length:
            yield (
                f"tokenize.shard_tokens: {self.tokenize.shard_tokens} leaves no whole sequence of "
                f"train.sequence_length = {self.train.sequence_length} in the validation shard; raise it."
            )
        for task in self.evaluate.tasks:
            benchmark = benchmark_of(task)
            if task in known_tasks() and benchmark not in self.download.benchmarks:
                yield (
                    f"evaluate.tasks: {task} needs the data of the benchmark {benchmark}, which is not in "
                    f"download.benchmarks; add it there, or drop the task."
                )
        for name in self.evaluate.baselines:
            if is_model_folder(name) and _is_trained(name):
                yield (
                    f"evaluate.baselines: {name} is the output of train, so the model would be compared with itself; drop it, "
                    "or name a copy of an earlier model."
                )
            if is_downloaded(name) and name not in self.download.models:
                yield (
                    f"evaluate.baselines: {name} is not in download.models, so there would be no weights to measure; add it "
                    "there, or drop it here."
                )
        if self.train.hellaswag_every is not None and "hellaswag" not in self.download.benchmarks:
            yield (
                f"train.hellaswag_every: {self.train.hellaswag_every} needs the HellaSwag items, and "
                f"download.benchmarks = {list(self.download.benchmarks)} does not name hellaswag; add it there, or set this to "
                "null."
            )
        if self.evaluate.batch_tokens < self.model.context_length:
            yield (
                f"evaluate.batch_tokens: {self.evaluate.batch_tokens} is less than one context of "
                f"{self.model.context_length} tokens (model.context_length); raise it."
            )
        yield from self._problems_of_initial_weights()
        yield from self._problems_of_finetuning()

    def _problems_of_initial_weights(self) -> Iterator[str]:
        """Yield what the parameters alone show to be wrong with `model.init_from`. The train stage checks folders."""
        name = self.model.init_from
        if self.model.init_is_published and not is_downloaded(name):
            near = difflib.get_close_matches(name, [*RANDOM, *PUBLISHED_MODELS], n=1)
            hint = f"did you mean {near[0]}?" if near else f"write ./{name} if it is a folder."
            yield (
                f"model.init_from: {name!r} is none of {', '.join([*RANDOM, *PUBLISHED_MODELS])}, and a folder needs "
                f"a slash in its name; {hint}"
            )
        elif self.model.init_is_published:
            if name in PUBLISHED_MODELS and self.vocabulary.source != "gpt2":
                yield (
                    f"model.init_from: {name} has GPT-2's vocabulary, and vocabulary.source = {self.vocabulary.source!r} makes "
                    "another, so its weights could not read the data; set vocabulary.source: gpt2."
                )
            if name not in self.download.models:
                yield (
                    f"model.init_from: {name} needs weights from the hub, and download.models = "
                    f"{list(self.download.models)} does not name it; add it there."
                )
            if name in PUBLISHED_MODELS and (differing := self.model.difference(published_params(name))):
                yield f"model.init_from: {name} has {differing}"
        elif _is_trained(name):
            yield (
                f"model.init_from: {name} is the output of train, and DVC removes it before train runs; copy the folder, and "
                "name the copy."
            )

    def _problems_of_finetuning(self) -> Iterator[str]:
        """Yield what does not fit the other sections. The finetune stage checks other bases than `models`."""
        finetune = self.finetune
        if finetune.source == "none" or (finetune.source == "docs" and self.download.source != "docs"):
            return
        if finetune.source == "hub" and self.download.conversations is None:
            yield (
                "finetune.source: hub reads what download.conversations names, and that is null; set it, for example to "
                "{repo: OWNER/NAME, revision: COMMIT, folder: data}, or choose another source."
            )
        if finetune.init_from == BASE and finetune.sequence_length > self.model.context_length:
            yield (
                f"finetune.sequence_length: {finetune.sequence_length} is longer than model.context_length = "
                f"{self.model.context_length}, so the model could not read a whole row; lower it."
            )
        if (
            finetune.init_from != BASE
            and not finetune.init_is_folder
            and finetune.init_from not in self.download.models
        ):
            yield (
                f"finetune.init_from: {finetune.init_from!r} is neither {BASE} nor one of download.models = "
                f"{list(self.download.models)}, so no model is found; add it to download.models, or write "
                f"./{finetune.init_from} if it is a folder."
            )


def _is_trained(folder: str) -> bool:
    """Return whether a folder is the output of train."""
    return "\0" not in folder and Path(folder).resolve() == HERE.model.resolve()


def load_params(path: Path = HERE.params) -> Params:
    """Read and check a parameter file.

    Raises:
        ParamsError: lists every problem of the file.
        UserError: the file is missing or not YAML.
    """
    problems: list[str] = []
    params = parse(Params, read_yaml(path), "", problems)
    if params is None:
        raise ParamsError(path, problems)
    return params
