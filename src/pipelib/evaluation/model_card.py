"""reports/model_card.md: what a stranger must know about the model, in the format of the Hugging Face hub.

It depends only on what evaluate reads, so that equal inputs give equal bytes. The commit may change while the content stays
the same, so `pipelib publish` adds it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelib.corpus.published_models import PUBLISHED_MODELS
from pipelib.evaluation.curves import read_curve
from pipelib.evaluation.document import Table, to_markdown
from pipelib.files import read_json, sha256_file, write_text
from pipelib.model.params import ModelParams
from pipelib.model.recipe import read_recipe
from pipelib.tokens.shards import Manifest
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import ChatPlaces

REPRODUCE = "## Reproduce it"
"""The heading under which `pipelib publish` writes the commit."""
LOAD_FROM = '"models"'
"""The argument of `from_pretrained` in the card; `pipelib publish` replaces it by the repository's name."""
LICENCES = {
    "docs": "Docstrings of open-source packages, each under its package's licence: BSD-3-Clause for numpy, scipy, scikit-learn, "
    "pandas, networkx and sympy, a licence in the style of BSD for torch.",
    "local": "The files of whoever trained the model. Their licence is for that person to state; nothing here knows it.",
    "HuggingFaceFW/fineweb-edu": "ODC-By 1.0 (https://opendatacommons.org/licenses/by/1-0/). The text comes from Common Crawl, "
    "whose terms of use hold too (https://commoncrawl.org/terms-of-use).",
}
"""The licence of each kind of data, or of a repository of the hub."""


def write_model_card(path: Path, models: Path, curves: Path, manifest: Manifest, result: Mapping[str, object]) -> None:
    """Write the model card.

    Args:
        models: the model's folder, whose recipe has everything that decided its weights.
        curves: the folder of train.csv and validation.csv.
        manifest: the data's manifest.
        result: the evaluation's result, as in metrics/evaluate.json.
    """
    params = _params(models, manifest)
    recipe = read_recipe(models)
    rows = [(key, _value(value)) for key, value in recipe.items() if not key.startswith(("data ", "data."))]
    source = manifest.source
    repo = source.get("repo") if source.get("kind") == "hub" else None
    parts = [
        _front_matter(params.architecture, repo),
        f"# {params.title}, {params.parameters(manifest.tokenizer.size):,} parameters",
        "Pretrained with pipelib, a pipeline whose every step can be repeated. Each figure below was measured by it.",
        "## Load it",
        f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({LOAD_FROM})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({LOAD_FROM})\n```",
        "It continues text. It was not taught to follow instructions or to be safe, it states false things fluently, and it has "
        "seen nothing but the data below.",
        "## Evaluation",
        _table(("what", "value", "of"), evaluation_rows(result)),
        "Brackets hold 95 % intervals. Scores of other code can follow other rules: compare like with like.",
        "## Losses",
        _table(("what", "value", "after"), _losses(curves)),
        "![Loss of training and validation](loss.png)",
        "## Data",
        _table(("what", "value"), _data(manifest)),
        f"**Licence of the data.** {licence(source)}",
        *_initial_weights(recipe),
        "## Recipe",
        _table(("what", "value"), rows) if rows else "Unknown: the model's README does not say it.",
        REPRODUCE,
        "```console\n$ make setup\n$ .venv/bin/dvc repro\n```",
        "Before `dvc repro`, put the recipe's values into `params.yaml`, where they are not there already. On the same processor "
        "with the same number of threads a CPU gives these very bytes:",
        _table(
            ("file", "SHA-256"),
            ((f"`{file.name}`", f"`{sha256_file(file)}`") for file in [models / "model.safetensors"]),
        ),
    ]
    write_text(path, "\n\n".join(parts) + "\n")


CHAT_FROM = '"chat/model"'
"""The same in the card of the fine-tuned model."""
CHAT_LOAD = f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({CHAT_FROM})
tokenizer = AutoTokenizer.from_pretrained({CHAT_FROM})
question = [{{"role": "user", "content": "What is a sparse array?"}}]
tokens = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**tokens, max_new_tokens=64)
print(tokenizer.decode(answer[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def write_chat_card(
    path: Path,
    chat: ChatPlaces,
    params: ModelParams,
    tokenizer: Tokenizer,
    manifest: Manifest,
    result: Mapping[str, object],
) -> None:
    """Write the card of the fine-tuned model.

    Args:
        chat: what finetune has made.
        params: of the model in it.
        tokenizer: the model's.
        manifest: of the data that `models/` was trained on.
        result: the evaluation of the chat model, as in metrics/evaluate.json.
    """
    recipe, lineage, said = read_recipe(chat.model), read_json(chat.manifest), read_json(chat.answers)
    base, conversations = lineage["base"], lineage["conversations"]
    # The base may have been tuned itself: its recipe is then in that of its own base.
    data = next((value for key, value in recipe.items() if key.endswith("recipe.data.fingerprint")), "not known here")
    own = [(key, _value(value)) for key, value in recipe.items() if not key.startswith(("base.", "conversations."))]
    parts = [
        _front_matter(params.architecture, None),
        f"# {params.title}, {params.parameters(tokenizer.size):,} parameters, fine-tuned on conversations",
        "Fine-tuned with pipelib, a pipeline whose every step can be repeated. Each figure below was measured by it.",
        "## Load it",
        CHAT_LOAD,
        "It answers in the form of its conversations. It was not taught to be safe, and it states false things fluently.",
        "## Its answers, unedited",
        *(f"**{entry['question']}**\n\n````text\n{entry['answer']}\n````" for entry in said["questions"]),
        "## Fine-tuning",
        _table(("what", "value", "of"), evaluation_rows(said["measured"])),
        "Losses are nats per trained token of held-out conversations. `answers.ended` and `answers.exact` are shares "
        "of `answers.count` held-out questions; `corpus_bits_per_byte` shows what was forgotten.",
        "## Evaluation",
        _table(("what", "value", "of"), evaluation_rows(result)),
        "Brackets hold 95 % intervals. These are the measures of a model that continues text.",
        "## Where it comes from",
        _table(
            ("what", "value"),
            [
                ("base", f"`{base['init_from']}`, weights SHA-256 `{base['weights_sha256']}`"),
                ("conversations", f"`{lineage['source']}`, SHA-256 `{conversations['sha256']}`"),
                ("conversations as tokens", f"SHA-256 `{conversations['tokens_sha256']}`"),
                ("data of the base", f"`{data}`"),
                ("weights", f"SHA-256 `{sha256_file(chat.model / 'model.safetensors')}`"),
            ],
        ),
        f"**Licence of the base.** {_licence_of_base(base['init_from'], data, manifest)}",
        "## Recipe",
        _table(("what", "value"), own),
        REPRODUCE,
        "```console\n$ make setup\n$ .venv/bin/dvc repro\n```",
    ]
    write_text(path, "\n\n".join(parts) + "\n")


def _licence_of_base(init_from: str, data: str, manifest: Manifest) -> str:
    """What is known about the licence of the weights that fine-tuning started from."""
    if data == manifest.fingerprint:
        return licence(manifest.source)
    if init_from in PUBLISHED_MODELS:
        return "OpenAI's weights, under their modified MIT licence."
    return "That of the weights in the base's folder; nothing here knows it."


def licence(source: Mapping[str, Any]) -> str:
    """What is known about the licence of a corpus, by the source in its manifest."""
    kind = str(source.get("kind", ""))
    if kind != "hub":
        return LICENCES.get(kind, LICENCES["local"])
    repo = str(source.get("repo", ""))
    return LICENCES.get(repo, f"That of https://huggingface.co/datasets/{repo}, which its card states.")


def evaluation_rows(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(what, value, of what) for every number in metrics/evaluate.json, however deeply nested."""
    about = [f"version {result['version']}"] if "version" in result else []
    if "examples" in result:
        count, there = result["examples"], result.get("examples_in_all", result["examples"])
        about.append(f"{count:,} examples" if count == there else f"the first {count:,} of {there:,} examples")
    for key, value in result.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and "value" in value:
            interval = f" ({value['low']:.4f} to {value['high']:.4f})" if {"low", "high"} <= value.keys() else ""
            yield name, f"{value['value']:.4f}{interval}", f"{value['items']:,} items" if "items" in value else ""
        elif isinstance(value, Mapping):
            yield from evaluation_rows(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and not _describes_another(key):
            error = result.get(f"{key}_stderr")
            text = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
            yield name, text if error is None else f"{text} ± {error:.4f}", ", ".join(about)


def _describes_another(key: str) -> bool:
    return key.startswith(("version", "examples", "limit")) or key.endswith("_stderr")


def _table(header: tuple[str, ...], rows: Iterable[Sequence[str]]) -> str:
    return to_markdown([Table(header, list(rows))]).rstrip("\n")


def _front_matter(architecture: str, repo: str | None) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{architecture}, pipelib]"]
    lines += [f"datasets: [{repo}]"] if repo else []
    return "\n".join(["---", *lines, "---"])


def _params(models: Path, manifest: Manifest) -> ModelParams:
    from pipelib.model.huggingface import read_params

    return read_params(models, manifest.tokenizer)


def _losses(curves: Path) -> Iterator[tuple[str, str, str]]:
    for name, column, what in (
        ("train.csv", "loss", "training, its last batch"),
        ("validation.csv", "val_loss", "validation while training"),
    ):
        curve = read_curve(curves / name)
        if curve[column]:
            step, tokens, loss = (curve[key][-1] for key in ("step", "tokens", column))
            yield what, f"{loss:.4f}", f"step {step:,.0f}, {tokens:,.0f} tokens"


def _data(manifest: Manifest) -> Iterator[tuple[str, str]]:
    source = manifest.source
    yield (
        "source",
        f"`{json.dumps({key: value for key, value in source.items() if key != 'files'}, ensure_ascii=False)}`",
    )
    if "files" in source:
        yield "files", f"{len(source['files']):,}, with their SHA-256 in the manifest"
    yield "fingerprint", f"`{manifest.fingerprint}` (SHA-256 of `data/tokens/manifest.json`)"
    tokenizer = manifest.tokenizer
    yield "vocabulary", f"{tokenizer.title}, {tokenizer.size:,} tokens, `{tokenizer.fingerprint}`"
    for split in ("train", "val"):
        yield f"tokens, {split}", f"{manifest.tokens(split):,}"


def _initial_weights(recipe: Mapping[str, Any]) -> Iterator[str]:
    """A sentence about the initial weights, unless they were random."""
    if {
        "initial_weights_sha256",
        "initial weights, sha256",
    } & recipe.keys():  # the second in models of before recipe.json
        name = recipe.get("model.init_from", "")
        theirs = "." if "/" in name else " (OpenAI's, under their modified MIT licence)."
        yield f"**Initial weights.** Training went on from `{name}`{theirs}"


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
