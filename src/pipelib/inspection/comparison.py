"""What differs between runs, its effect, and the confidence interval: the rows of a table, and notes on it."""

import math
import statistics
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from pipelib.evaluation.items import read_scores
from pipelib.inspection.bootstrap import Scores, mean, measures, paired_difference
from pipelib.inspection.runs import RunFiles, changed_code, differing_params
from pipelib.progress import format_seconds
from pipelib.workspace.places import HERE

SEEDS = 3
"""The number of seeds from which the noise of training is reported."""
SEED = "train.seed"
_PARTS = ("low", "high", "items", "version", "examples", "examples_in_all", "limit")
"""Last parts of keys of metrics that describe another metric; so do those of standard errors."""


def rows_of(runs: Sequence[RunFiles]) -> list[list[str]]:
    """One row per parameter, metric and circumstance: its name, and one cell per run.

    From the second run on, a metric's cell also has the difference from the first run, with the paired 95 % interval if both
    were measured on the same items.
    """
    return [*_params(runs), *_metrics(runs), *_circumstances(runs)]


def notes_on(runs: Sequence[RunFiles]) -> list[str]:
    """Notes on the table: missing items, different code, and the noise of training as far as seeds show it."""
    return [*_notes(runs), *_noise(runs)]


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _params(runs: Sequence[RunFiles]) -> Iterator[list[str]]:
    for key, values in differing_params(runs):
        yield [key, *("" if value is None else str(value) for value in values)]


def _metrics(runs: Sequence[RunFiles]) -> Iterator[list[str]]:
    """Metrics of train, finetune and evaluate, and measures on items that have no metric of their own."""
    scores = [_scores(run) for run in runs]
    same = [vocabulary_of(run) == vocabulary_of(runs[0]) for run in runs]
    shown = set()
    for stage in ("train", "finetune", "evaluate"):
        found = [run.metrics.get(stage, {}) for run in runs]  # runs of before have no finetune
        for key in dict.fromkeys(key for metrics in found for key in metrics):
            values = [_number(metrics.get(key)) for metrics in found]
            name = measure_of(key) if stage == "evaluate" else ""
            shown.add(name)
            if len(set(values)) == 1 or is_part(key):
                continue
            comparable = same if is_per_token(key) else [True] * len(runs)
            yield [f"{stage} {key.removesuffix('.value')}", *_cells(values, name, scores, comparable)]
    for name in dict.fromkeys(name for score in scores for name in measures(score)):
        if name not in shown:
            values = [mean(s, name) if name in s else None for s in scores]
            comparable = same if is_per_token(name) else [True] * len(runs)
            yield [f"items {name}", *_cells(values, name, scores, comparable)]


def vocabulary_of(run: RunFiles) -> str:
    """What identifies a run's vocabulary: its name and fingerprint."""
    found = run.metrics.get("vocabulary", {})  # earlier runs have none: they are GPT-2's
    return f"{found.get('name', 'gpt2')} {found.get('vocabulary_sha256', '')}"


def is_per_token(key: str) -> bool:
    """Whether a metric is a loss per token, which means nothing for another vocabulary. The harness's are per byte or word."""
    of_harness = "lm_eval" in key.split(".")
    return not of_harness and (key.rpartition(".")[2] == "perplexity" or "loss" in key)


def is_part(key: str) -> bool:
    """Whether a metric describes another one, or another model."""
    return key.rpartition(".")[2] in _PARTS or key.endswith("_stderr") or key.startswith("baselines.")


def measure_of(key: str) -> str:
    """The name of a metric's items: `completion.acc.value` -> `completion/acc`, `val_loss` -> `validation/loss`."""
    return "validation/loss" if key == "val_loss" else key.removesuffix(".value").replace(".", "/")


def _cells(
    values: Sequence[float | None], name: str, scores: Sequence[Scores], comparable: Sequence[bool]
) -> Iterator[str]:
    """The value of each run; from the second on, with the difference from the first if the two can be compared."""
    for number, value in enumerate(values):
        first = values[0]
        if value is None:
            yield ""
        elif number == 0 or first is None or not comparable[number]:
            yield _plain(value)
        else:
            found = paired_difference(scores[0], scores[number], name)
            if found and not name.endswith("perplexity"):  # perplexity is not a mean of its items
                unit = math.log(2) if name.endswith("bits_per_byte") else 1.0  # items are in nats
                low, high = found.low / unit, found.high / unit
                yield f"{_plain(value)}  {found.value / unit:+.4f} ({low:+.4f} to {high:+.4f})"
            else:
                yield f"{_plain(value)}  {_plain(value - first, sign='+')}"


def _circumstances(runs: Sequence[RunFiles]) -> Iterator[list[str]]:
    yield ["tokens trained on", *(_count(run.metrics["train"].get("tokens")) for run in runs)]
    yield [
        "time, all stages",
        *(_time(sum(_number(s.get("seconds")) or 0 for s in run.speed.values())) for run in runs),
    ]
    hours = [_number(run.speed["train"].get("device_hours")) for run in runs]
    yield ["device hours, train", *("" if value is None else f"{value:,.4f}" for value in hours)]
    yield ["tokens/s", *(_count(run.speed["train"].get("tokens_per_second")) for run in runs)]
    for out in map(str, (HERE.tokens, HERE.model, HERE.chat)):
        yield [f"md5 of {out}", *(run.md5(out)[:8] for run in runs)]


# ---- Notes -----------------------------------------------------------------------------------------------------------


def _notes(runs: Sequence[RunFiles]) -> Iterator[str]:
    yield (
        "Metrics that are equal in all runs are left out. Differences are from the first run; in brackets, the 95 % interval "
        "over texts, the same texts for both models."
    )
    first = runs[0]
    for run in runs:
        if not _scores(run):
            yield (
                f"{run.name} has no scores of single items here (reports/items.npz), so its differences have no interval; "
                "`dvc fetch` gets them, or dvc repro makes them."
            )
    for other in runs[1:]:
        if vocabulary_of(first) != vocabulary_of(other):
            yield (
                f"{other.name} has another vocabulary than {first.name}: losses and perplexities are per token, so they are not "
                "subtracted; compare bits per byte and acc_norm_bytes."
            )
        if changed := changed_code(first, other):
            yield f"{other.name} ran other code than {first.name}: {', '.join(changed)}."
        unpaired = [
            name
            for name in measures(_scores(first))
            if name in _scores(other) and not paired_difference(_scores(first), _scores(other), name)
        ]
        if unpaired:
            yield f"{other.name} was measured on other items than {first.name} in {', '.join(unpaired)}: no interval."


def _noise(runs: Sequence[RunFiles]) -> Iterator[str]:
    """The noise of training, from runs that differ only in their seed."""
    groups: dict[str, list[RunFiles]] = {}
    for run in runs:
        rest = sorted((key, str(value)) for key, value in run.params.items() if key != SEED)
        groups.setdefault(repr((rest, run.md5(str(HERE.tokens)), sorted(run.code.items()))), []).append(run)
    too_few: dict[int, list[str]] = {}
    for group in groups.values():
        seeds = {str(run.params.get(SEED)): run for run in group}
        names = ", ".join(run.name for run in group)
        if len(seeds) < SEEDS:
            too_few.setdefault(len(seeds), []).append(names)
            continue
        for key in dict.fromkeys(key for run in seeds.values() for key in run.metrics["evaluate"]):
            values = [_number(run.metrics["evaluate"].get(key)) for run in seeds.values()]
            numbers = [value for value in values if value is not None and math.isfinite(value)]
            if not is_part(key) and len(numbers) == len(seeds) and len(set(numbers)) > 1:
                yield (
                    f"{names}: {key.removesuffix('.value')} over {len(seeds)} seeds: mean {_plain(statistics.mean(numbers))}, "
                    f"standard deviation {_plain(statistics.stdev(numbers))}."
                )
    for count, those in too_few.items():
        words = "one seed" if count == 1 else f"{count} seeds"
        yield (
            f"{'; '.join(those)}: {words}: training noise unknown; {SEEDS} runs with other values of {SEED} would show it."
        )


@cache
def _scores_of(path: Path) -> Scores:
    return read_scores(path)


def _scores(run: RunFiles) -> Scores:
    return _scores_of(run.items.absolute()) if run.items else {}


# ---- Format ----------------------------------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # an int of more than 308 digits
        return math.inf


def _plain(value: float, sign: str = "") -> str:
    return format(value, f"{sign},.0f" if value.is_integer() and abs(value) >= 10 else f"{sign},.4f")


def _count(value: object) -> str:
    number = _number(value)
    return "" if number is None else f"{number:,.0f}"


def _time(seconds: float) -> str:
    return format_seconds(seconds) if seconds and math.isfinite(seconds) else ""
