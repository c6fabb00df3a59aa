"""The evaluation for people: evaluation.md and evaluation.html. The same inputs of the stage give the same bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelib.evaluation.document import Block, Heading, Paragraph, Picture, Table, Text, to_html, to_markdown
from pipelib.evaluation.pictures import Line, draw_column, draw_hellaswag, draw_loss, has_rows
from pipelib.evaluation.published import Published, published_beside
from pipelib.files import write_text

CHANCE = 0.25
LOSSES = {
    "val_loss": "validation loss, nats per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
OURS = "**this model**"
AccuracyJson = Mapping[str, float]
"""An accuracy as `accuracy_json` writes it: value, low, high, items."""


@dataclass(frozen=True)
class Subject:
    """The evaluated model and everything that the report says about it."""

    result: Mapping[str, Any]
    """As in metrics/evaluate.json."""
    baselines: Mapping[str, Mapping[str, Any]]
    """The results of other models, by name."""
    parameters: int
    vocab_size: int
    """The number of tokens that the model chooses among."""
    source: Mapping[str, Any]
    """The corpus's source; empty if unknown."""
    facts: Mapping[str, str]
    """What the numbers belong to: fingerprints, sizes, versions."""
    samples: Sequence[tuple[str, str]]
    """(prompt, continuation)."""
    curves: Path | None
    """The folder of the training's curves, if there is one."""
    has_own_vocabulary: bool = False
    """Whether the vocabulary is another than GPT-2's, to which published losses belong."""


def interval(accuracy: AccuracyJson) -> str:
    """An accuracy and its interval as text."""
    return f"{accuracy['value']:.4f} ({accuracy['low']:.4f} to {accuracy['high']:.4f})"


def verdict(name: str, accuracy: AccuracyJson, unigram: AccuracyJson | None) -> str:
    """A sentence that says whether an accuracy differs from chance."""
    if accuracy["low"] <= CHANCE <= accuracy["high"]:
        words = "its 95 % interval includes 0.25: nothing shows that the model knows more than chance"
    elif accuracy["value"] < CHANCE:
        words = "its 95 % interval is below 0.25: the model prefers wrong endings"
    else:
        words = "its 95 % interval is above 0.25, which is chance"
    beside = f"; a unigram model scores {interval(unigram)}" if unigram else ""
    return f"{name}: acc_norm {interval(accuracy)} on {accuracy['items']:,} items, {words}{beside}."


def write_report(folder: Path, subject: Subject) -> None:
    """Write evaluation.md, evaluation.html and their pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(_blocks(folder, subject))
    write_text(folder / "evaluation.md", to_markdown(blocks))
    write_text(folder / "evaluation.html", to_html("Evaluation", blocks))


def _blocks(folder: Path, subject: Subject) -> Iterator[Block]:
    yield Heading("Evaluation", 1)
    yield Table(("measure", "model", "value", "on", "from"), list(rows_of(subject)))
    for name in completions_of(subject.result):
        found = subject.result[name]
        yield Paragraph(verdict(name, found["acc_norm"], found.get("unigram", {}).get("acc_norm")))
    yield Paragraph(
        "Brackets hold the 95 % interval; ± is followed by one standard error. `completion` and `hellaswag` are in completion "
        "style: four endings, chance 0.25, `acc` takes the smallest summed loss, `acc_norm` the smallest mean loss per token, "
        "`acc_norm_bytes` per byte of text; intervals treat texts as independent, not the items made from one text. Losses "
        "per token compare only between models of one vocabulary; bits per byte compare always. `lm_eval` is the lm-eval "
        "harness, with its own scorers. A validation loss is over every token of the validation shard but the first, in rows "
        "of the model's own "
        "context. Published figures were not measured here. `items.npz` beside this file has the scores of every item and row; "
        "`pipelib.evaluation.items` reads it."
    )
    yield from _pictures(folder, subject)
    yield Heading("What was measured")
    yield Table(("what", "value"), list(subject.facts.items()))
    yield Heading("Samples")
    for prompt, text in subject.samples:
        yield Text(prompt + text)


def completions_of(result: Mapping[str, Any]) -> list[str]:
    """The names of the completion-style benchmarks in a result."""
    return [name for name, value in result.items() if isinstance(value, Mapping) and "acc_norm" in value]


def rows_of(subject: Subject) -> Iterator[Sequence[str]]:
    """A row for each measure and model: ours, the baselines, a unigram model, then published figures."""
    results = {OURS: subject.result, **subject.baselines}
    for measure, name in LOSSES.items():
        for model, result in results.items():
            if measure in result:
                yield (
                    name,
                    model,
                    _number(measure, result[measure]),
                    f"{result['val_tokens']:,} tokens{_of_which_vocabulary(result)}",
                    "measured here",
                )
        if not subject.has_own_vocabulary:
            yield from _published(measure, name, subject)
    for benchmark in completions_of(subject.result):
        for metric in ("acc", "acc_norm", "acc_norm_bytes"):
            measure = f"{benchmark}.{metric}"
            for model, result in results.items():
                if metric in result[benchmark]:
                    yield _accuracy(measure, model, result[benchmark][metric])
            if metric in subject.result[benchmark].get("unigram", {}):
                yield _accuracy(measure, "unigram model", subject.result[benchmark]["unigram"][metric])
            yield from _published(measure, measure, subject)
    for task, scores in subject.result.get("lm_eval", {}).items():
        # Only metrics have a standard error; `version`, `examples` and `limit` do not.
        for metric in (name.removesuffix("_stderr") for name in scores if name.endswith("_stderr")):
            measure = f"lm_eval.{task}.{metric}"
            for model, result in results.items():
                yield _task_score(measure, model, metric, result["lm_eval"][task], result["lm_eval_version"])
            yield from _published(measure, measure, subject)


def _of_which_vocabulary(result: Mapping[str, Any]) -> str:
    """The vocabulary of a model that has another one than the data; losses per token do not compare then."""
    return f" of {result['vocabulary']}; compare bits per byte" if "vocabulary" in result else ""


def _accuracy(measure: str, model: str, accuracy: AccuracyJson) -> Sequence[str]:
    return measure, model, interval(accuracy), f"{accuracy['items']:,} items", "measured here"


def _task_score(measure: str, model: str, metric: str, scores: Mapping[str, Any], harness: str) -> Sequence[str]:
    stderr = scores[f"{metric}_stderr"]
    value = _number(metric, scores[metric]) + ("" if stderr is None else f" ± {_number(metric, stderr)}")
    number = f"{scores['examples']:,} of {scores['examples_in_all']:,} examples"
    return measure, model, value, number, f"measured here, task version {scores['version']:g}, lm-eval {harness}"


def _published(measure: str, name: str, subject: Subject) -> Iterator[Sequence[str]]:
    for figure in published_beside(measure, subject.parameters, subject.source):
        yield name, figure.model, f"{figure.value:.4f}", "", f"published: {figure.source}"


def _number(measure: str, value: float) -> str:
    return f"{value:,.2f}" if measure.endswith("perplexity") else f"{value:.4f}"


def _pictures(folder: Path, subject: Subject) -> Iterator[Block]:
    """Draw the training's curves, if there are any, with horizontal lines for other models."""
    if subject.curves is None:
        return
    yield Heading("Training")
    draw_loss(subject.curves, folder / "loss.png", subject.vocab_size, _levels("val_loss", subject))
    yield Picture(folder / "loss.png", "Loss of training and validation")
    if has_rows(subject.curves / "hellaswag.csv"):
        draw_hellaswag(subject.curves, folder / "hellaswag.png", _levels("hellaswag.acc_norm", subject))
        yield Picture(folder / "hellaswag.png", "HellaSwag during training")
    for name, column, title in (
        ("learning_rate.png", "learning_rate", "learning rate"),
        ("grad_norm.png", "grad_norm", "gradient norm before clipping"),
    ):
        draw_column(subject.curves, column, folder / name, title)
        yield Picture(folder / name, title.capitalize())


def _levels(measure: str, subject: Subject) -> list[Line]:
    """The values of the baselines that were measured; if none was, published figures."""
    name, _, metric = measure.partition(".")
    is_loss = measure in LOSSES
    found = {
        model: result[name]
        for model, result in subject.baselines.items()
        if name in result and not (is_loss and "vocabulary" in result)
    }
    if found:
        return [(f"{model}, measured", value[metric]["value"] if metric else value) for model, value in found.items()]
    if is_loss and subject.has_own_vocabulary:
        return []
    return [_level(figure) for figure in published_beside(measure, subject.parameters, subject.source)]


def _level(figure: Published) -> Line:
    return f"{figure.model}, published", figure.value
