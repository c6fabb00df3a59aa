"""Run the lm-eval harness on our model in memory, without network.

https://github.com/EleutherAI/lm-evaluation-harness. Scores equal those of its own `hf` model on the exported folder; a
test compares them. Two things differ. The standard errors are ours: for some metrics the harness would bootstrap in processes
of its own, and for others it has none. And equal contexts are computed once.
"""

import glob
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelib.errors import UserError, how_to_repair, tell
from pipelib.evaluation.endings import Question, TokenIds, score_endings
from pipelib.evaluation.items import ItemScores, Numbers, item_ids
from pipelib.evaluation.params import TASKS, EvaluateParams
from pipelib.model.decoder import Decoder
from pipelib.model.generate import Sampling, generate
from pipelib.progress import Progress
from pipelib.vocabulary.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskResult:
    """The result of one task."""

    scores: dict[str, float | int | None]
    """Every metric and its `_stderr`; the task's `version`; `examples` scored, of `examples_in_all`, and the `limit` if any."""
    items: ItemScores
    """The scores of every example."""


def run_tasks(
    model: Decoder, tokenizer: Tokenizer, params: EvaluateParams, benchmarks: Path, scratch: Path
) -> dict[str, TaskResult]:
    """Run `params.tasks`.

    Args:
        benchmarks: the folder of the tasks' data, one file `NAME.jsonl` each.
        scratch: a folder for the harness's copies of the data.

    Raises:
        UserError: a task's data is missing or damaged, or the model's losses are not finite.
    """
    if not params.tasks:
        return {}
    tell(f"lm-eval: loading {', '.join(params.tasks)}", error=True)
    # Set before the import, which reads them: do not ask the hub, and keep no copies in the user's home.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=str(scratch))
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    stderr = sys.stderr
    try:
        for task in params.tasks:
            check_rows(benchmarks / f"{task}.jsonl")
        with redirect_stderr(io.StringIO()):  # hides progress bars that cannot be switched off; errors are raised
            manager = TaskManager(include_path=str(TASKS), include_defaults=False)
            loaded = manager.load([_definition(task, benchmarks) for task in params.tasks])
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            outcome = evaluate(
                language_model(model, tokenizer, params, lambda: redirect_stderr(stderr)),
                loaded,
                limit=params.task_limit,
                bootstrap_iters=0,
                log_samples=True,
            )
    except FileNotFoundError as error:
        raise UserError(
            f"a task's data is missing ({error}), so it cannot be scored; name its benchmark in download.benchmarks "
            "and run dvc repro."
        ) from None
    assert outcome is not None
    return {task: _result_of(task, outcome, params.task_limit) for task in params.tasks}


def _definition(task: str, benchmarks: Path) -> dict[str, Any]:
    """A task as its file defines it, with the paths of its data in our folder."""
    from lm_eval.tasks._yaml_loader import load_yaml

    definition: dict[str, Any] = load_yaml(TASKS / f"{task}.yaml")
    files = definition["dataset_kwargs"]["data_files"]
    for split, file in files.items():
        files[split] = glob.escape(str(benchmarks / Path(file).name))  # datasets reads it as a pattern
    return definition


def check_rows(path: Path) -> None:
    """Refuse a task's data if a line is not a JSON object or a choice is empty, before the harness fails on it.

    Raises:
        UserError: with the line and what to run.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                choices = row.get("choices", row.get("endings"))
                texts = choices["text"] if isinstance(choices, dict) else choices
                valid = texts is None or (bool(texts) and all(map(str.strip, texts)))
            except (AttributeError, KeyError, TypeError, ValueError):
                valid = False
            if not valid:
                raise UserError(
                    f"{path}, line {number} is not a valid example, so it cannot be scored: it is not a JSON object, or a choice "
                    f"is empty or missing; {how_to_repair(str(path.parent))}."
                )


def _result_of(task: str, outcome: Mapping[str, Any], limit: int | None) -> TaskResult:
    """Take one task's result out of what the harness returns, with our standard errors."""
    samples = outcome["samples"][task]
    values: dict[str, Numbers] = {}
    weights: dict[str, Numbers] = {}
    scores: dict[str, float | int | None] = {}
    for name, value in outcome["results"][task].items():
        metric = name.removesuffix(",none")
        if not name.endswith(",none") or not isinstance(value, int | float):  # a note, or "N/A"
            continue
        values[metric], metric_weights = _per_example(metric, [sample[metric] for sample in samples])
        if metric_weights is not None:
            weights[metric] = metric_weights
        scores[metric] = float(value)
        scores[f"{metric}_stderr"] = standard_error(metric, values[metric], metric_weights)
    scores |= {"version": outcome["versions"][task], "examples": outcome["n-samples"][task]["effective"]}
    scores |= {"examples_in_all": outcome["n-samples"][task]["original"]} | ({"limit": limit} if limit else {})
    documents = [sample["doc"].get("document") for sample in samples]
    ids = item_ids(sample["doc_hash"].encode("ascii") for sample in samples)
    own = [number if document is None else document for number, document in enumerate(documents)]
    return TaskResult(scores, ItemScores(ids, np.array(own, np.int64), values, weights))


def _per_example(metric: str, found: Sequence[Any]) -> tuple[Numbers, Numbers | None]:
    """The per-example numbers whose mean gives a metric, and their weights if they do not count equally.

    For a perplexity or bits per byte they are losses in nats: per word or byte if the harness gives a text's log-likelihood
    together with its number of words or bytes.
    """
    if isinstance(found[0], tuple | list):
        log_likelihoods, weights = np.array(found, np.float64).T
        return -log_likelihoods / weights, weights.astype(np.int64)
    if metric == "perplexity":
        return -np.array(found, np.float64), None
    values = np.array(found, np.float64)
    return (values.astype(np.bool_) if np.isin(values, (0.0, 1.0)).all() else values), None


def standard_error(metric: str, values: Numbers, weights: Numbers | None) -> float | None:
    """The standard error of a metric, from the spread of its examples; None for a single example.

    For a mean it is the standard error of the mean, as in the harness. For a weighted mean it is that of a ratio of sums
    (Cochran, Sampling Techniques, 1977, chapter 6). For a function of either it is multiplied by the function's slope.
    """
    if len(values) < 2:
        return None
    counts = np.ones(len(values)) if weights is None else weights.astype(np.float64)
    mean = float(values @ counts / counts.sum())
    residuals = counts * (values - mean)
    error = math.sqrt(float(residuals @ residuals) * len(values) / (len(values) - 1)) / float(counts.sum())
    if metric.endswith("perplexity"):
        return error * math.exp(mean)
    return error / math.log(2) if metric == "bits_per_byte" else error


def language_model(model: Decoder, tokenizer: Tokenizer, params: EvaluateParams, showing: Callable[[], Any]) -> Any:
    """Wrap our model in the harness's interface. The class is defined here so that its base class is imported only if used.

    Args:
        showing: returns a context in which progress may be printed.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    end, limit = tokenizer.end_token_id, model.params.context_length

    def log_likelihoods(what: str, pairs: Sequence[tuple[TokenIds, TokenIds]]) -> list[tuple[float, bool]]:
        with showing():
            progress = Progress(f"lm-eval: {what}", sum(len(continuation) for _, continuation in pairs), "tokens")
            found = score_pairs(model, pairs, params, progress.add)
            progress.close()
        return found

    class InMemory(TemplateLM):  # type: ignore[misc]
        """Tokens in, log-likelihoods out."""

        @property
        def eot_token_id(self) -> int:
            return end

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
            return tokenizer.encode(string, with_special=True)

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            return log_likelihoods("answers", [(context or [end], ending) for _, context, ending in requests])

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            windows = [
                [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, end, limit, 1)]
                for tokens in (self.tok_encode(request.args[0]) for request in requests)
            ]
            flat = [window for text in windows for window in text]
            scores = iter(log_likelihoods("whole texts", flat))
            return [sum(next(scores)[0] for _ in text) for text in windows]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            prompts = [(self.tok_encode(request.args[0]) or [end], request.args[1]) for request in requests]
            with showing():
                progress = Progress("lm-eval: generated texts", len(prompts), "texts")
                texts = continue_prompts(model, tokenizer, prompts, progress.add)
                progress.close()
            return texts

    return InMemory()


def score_pairs(
    model: Decoder,
    pairs: Sequence[tuple[TokenIds, TokenIds]],
    params: EvaluateParams,
    advance: Callable[[int], object] = lambda _: None,
) -> list[tuple[float, bool]]:
    """Score each (context, continuation): its log-likelihood in nats, and whether greedy decoding gives it.

    Continuations of the same context, such as the answers to a question, are scored together.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, _) in enumerate(pairs):
        by_context.setdefault(tuple(context), []).append(number)
    questions: list[Question] = [
        (context, [pairs[number][1] for number in numbers]) for context, numbers in by_context.items()
    ]
    found = score_endings(model, questions, params.batch_tokens, params.precision, advance, with_greedy=True)
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for numbers, scores in zip(by_context.values(), found, strict=True):
        for number, score in zip(numbers, scores, strict=True):
            results[number] = -float(score.losses.sum()), score.greedy
    return results


def continue_prompts(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[TokenIds, Mapping[str, Any]]],
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Continue each prompt up to the first of its stop strings. Prompts with the same options are generated together.

    Args:
        prompts: token ids, and the harness's options: `max_gen_toks` (256), `until`, `do_sample`, `temperature`. A prompt that
            leaves no room for the new tokens loses its start.
    """
    groups: dict[str, list[int]] = {}
    for number, (_, options) in enumerate(prompts):
        groups.setdefault(repr(sorted(options.items())), []).append(number)
    texts = [""] * len(prompts)
    for numbers in groups.values():
        options = prompts[numbers[0]][1]
        new_tokens = int(options.get("max_gen_toks", 256))
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        room = max(1, model.params.context_length - new_tokens)
        numbers.sort(key=lambda number: len(prompts[number][0]))  # texts of about the same length share a batch
        written = generate(
            model,
            [prompts[number][0][-room:] for number in numbers],
            new_tokens,
            Sampling(temperature),
            stop_token_id=tokenizer.end_token_id,
        )
        for number, new in zip(numbers, written, strict=True):
            texts[number] = _before(tokenizer.decode(new), options.get("until", []))
        advance(len(numbers))
    return texts


def _before(text: str, stops: str | Iterable[str]) -> str:
    """The text before the first stop string in it."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text
