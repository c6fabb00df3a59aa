"""The lm-eval harness on our model in memory, without network.

https://github.com/EleutherAI/lm-evaluation-harness. Scores equal those of its own `hf` model on the exported folder; a
test compares.
"""

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from pipelib.errors import UserError
from pipelib.evaluation.hellaswag import batches_of, ending_losses
from pipelib.evaluation.params import TASKS, EvaluateParams
from pipelib.model.generate import generate
from pipelib.model.gpt import GPT
from pipelib.model.vocabulary import EOT_TOKEN_ID


def run_tasks(model: GPT, params: EvaluateParams, scratch: Path) -> dict[str, Any]:
    """Run `params.tasks` and return the harness's results: per task its metrics, version and number of examples.

    Args:
        scratch: a folder for the harness's copies of the data.

    Raises:
        UserError: a task's data is not there.
    """
    if not params.tasks:
        return {}
    # Read at import: no look at the hub, and no copies in the user's home.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=str(scratch))
    import datasets
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()):  # bars that the harness shows whatever one asks; errors are raised
            outcome = simple_evaluate(
                model=language_model(model, params),
                tasks=list(params.tasks),
                task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
                limit=params.task_limit,
                bootstrap_iters=0,
                log_samples=False,
            )
    except FileNotFoundError as error:
        raise UserError(
            f"a task's data is missing ({error}); name its benchmark in download.benchmarks and run dvc repro."
        ) from None
    assert outcome is not None
    return {
        task: {
            **{name.removesuffix(",none"): value for name, value in scores.items() if _is_metric(name, value)},
            "version": outcome["versions"][task],
            "examples": outcome["n-samples"][task]["effective"],
        }
        for task, scores in outcome["results"].items()
    }


def _is_metric(name: str, value: object) -> bool:
    """Whether an entry of the harness's results is a number that a task measured; some are notes, or "N/A"."""
    return name.endswith(",none") and isinstance(value, int | float)


def language_model(model: GPT, params: EvaluateParams) -> Any:
    """Our model as the harness sees one; made in a function because the base class is imported only when used."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from pipelib.tokens.encoding import tiktoken_encoding

    encoding = tiktoken_encoding()
    limit = model.params.context_length

    class InMemory(TemplateLM):  # type: ignore[misc]
        """Tokens in, log-likelihoods out."""

        @property
        def eot_token_id(self) -> int:
            return EOT_TOKEN_ID

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
            return list(encoding.encode(string, allowed_special={"<|endoftext|>"}))

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            return log_likelihoods(model, [(context, ending) for _, context, ending in requests], params)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
            windows = [
                [make_disjoint_window(pair) for pair in get_rolling_token_windows(tokens, EOT_TOKEN_ID, limit, 1)]
                for tokens in (self.tok_encode(request.args[0]) for request in requests)
            ]
            flat = [window for of_text in windows for window in of_text]
            scores = iter(log_likelihoods(model, flat, params))
            return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
            return [self._continue(request.args[0], request.args[1]) for request in requests]

        def _continue(self, prompt: str, options: dict[str, Any]) -> str:
            wanted = int(options.get("max_gen_toks", 256))
            temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
            token_ids = self.tok_encode(prompt) or [EOT_TOKEN_ID]
            prompts = [token_ids[-max(1, limit - wanted) :]]
            (new,) = generate(model, prompts, wanted, temperature=temperature, stop_token_id=EOT_TOKEN_ID)
            text: str = encoding.decode(new)
            for stop in options.get("until", []):
                text = text.split(stop)[0] if stop else text
            return text

    return InMemory()


def log_likelihoods(
    model: GPT, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], params: EvaluateParams
) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's log-likelihood in nats, and whether greedy decoding gives it."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    limit = model.params.context_length
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for batch in batches_of(order, lambda i: min(limit, len(pairs[i][0]) + len(pairs[i][1]) - 1), params.batch_tokens):
        for index, (losses, greedy) in zip(
            batch,
            ending_losses(model, [pairs[index] for index in batch], params.precision, with_greedy=True),
            strict=True,
        ):
            results[index] = -float(losses.sum()), greedy
    return results
