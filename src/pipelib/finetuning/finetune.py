"""The finetune stage: encode conversations, train on them, and measure what changed."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelib.errors import UserError, tell
from pipelib.files import plural, write_json, write_text
from pipelib.finetuning.dataset import Counts, Dataset, encode
from pipelib.finetuning.masks_page import masks_page
from pipelib.finetuning.measure import (
    answer_conversations,
    answer_questions,
    corpus_bits_per_byte,
    exact_share,
    some_numbers,
)
from pipelib.finetuning.params import BASE, FinetuneParams
from pipelib.finetuning.sources import base_folder, find_conversations, lineage
from pipelib.finetuning.task import Base, FinetuneJob, Finetuning
from pipelib.model.device import pick_device
from pipelib.model.huggingface import import_model, read_chat_template
from pipelib.model.recipe import read_recipe
from pipelib.stage import Build, WorkResult
from pipelib.tokens.shards import UNIGRAM_COUNTS, read_manifest
from pipelib.training.batches import check_shares
from pipelib.training.launch.job import Job
from pipelib.training.launch.launch import launch
from pipelib.training.launch.machines import Machines, find_machines, require_gpu
from pipelib.training.memory import Footprint
from pipelib.training.schedule import Cadence
from pipelib.vocabulary.chat import ChatTemplate
from pipelib.workspace.places import ChatPlaces, Places

DATASET, LINEAGE = "conversations.npz", "lineage.json"
"""Files in the work folder, for the ranks."""
SHOWN = 24
"""Conversations on the page of masks."""


def finetune(
    build: Build, params: FinetuneParams, cadence: Cadence, tokens: Path, inputs: Mapping[str, Any]
) -> WorkResult:
    """Fine-tune, build `chat/`, and return the stage's result and speed.

    Args:
        tokens: the folder of the shards, for what the model forgets.
        inputs: everything that decides the result.

    Raises:
        UserError: conversations, model and parameters do not fit together, or the training failed.
    """
    base = Base(str(base_folder(params)), inputs["base"])
    template = ChatTemplate.of(base.tokenizer)
    _require_same_template(Path(base.folder), template)
    dataset, counts, bad_rows = _encode(params, template)
    if params.adapter:
        _warn_of_untrained_markers(params, template, tokens)

    # Check everything that can be checked before the ranks start.
    task, machines = Finetuning(params, base, dataset), _one_machine()
    rows = len(task.split(params.sequence_length, held_out=False))
    _require_rows(params, rows)
    train = params.training(rows)
    require_gpu(params.precision)
    _require_context(params, task)
    check_shares(train, machines.world_size)

    footprint = Footprint(task.model, base.tokenizer.size, train, machines.world_size, task.trained_parameters)

    dataset.write(build.work / DATASET)
    made_from = lineage(params, inputs, dataset.fingerprint, read_recipe(Path(base.folder)))
    write_json(build.work / LINEAGE, made_from)
    job = FinetuneJob(
        **Job.of(build, train, cadence),
        finetune=params,
        base=base,
        dataset=str(build.work / DATASET),
        lineage=str(build.work / LINEAGE),
    )
    trained, speed = launch(build, job, machines, footprint)

    places = ChatPlaces(Places(build.outs).chat)
    measured, answers = _measure(params, base, places.model, dataset, template, tokens)
    losses: dict[str, object] = {name: trained[name] for name in ("val_loss_before", "val_loss")}
    write_json(places.answers, {"questions": answers, "measured": losses | measured})
    write_text(places.masks, masks_page(dataset, some_numbers(dataset, SHOWN), base.tokenizer))
    write_json(places.manifest, {"source": params.source, **made_from})
    build.run.log_params(
        {
            "base_weights_sha256": base.sha256,
            "conversations_sha256": made_from["conversations"]["sha256"],
            "conversations_tokens_sha256": made_from["conversations"]["tokens_sha256"],
        }
    )
    for answer in answers:
        tell(f"finetune: {answer['question']} -> {answer['answer']}")
    build.run.log_text("answers.txt", "\n\n".join(f"{entry['question']}\n{entry['answer']}" for entry in answers))
    result = {
        "source": params.source,
        **_described(counts),
        "rows": rows,
        **({"bad_rows": bad_rows} if bad_rows else {}),
        **trained,
        **measured,
    }
    return result, speed


def _encode(params: FinetuneParams, template: ChatTemplate) -> tuple[Dataset, Counts, dict[str, int]]:
    source = find_conversations(params)
    dataset, counts = encode(
        source.read(),
        template,
        longest=params.sequence_length,
        train_on=params.train_on,
        validation=params.validation,
        most=params.max_conversations,
    )
    source.finish()
    counts.report(params.sequence_length)
    tell(
        f"finetune: {counts.kept:,} conversations, {counts.held_out:,} of them held out; {counts.tokens:,} tokens, "
        f"{counts.trained_tokens / counts.tokens:.0%} of them trained"
    )
    return dataset, counts, dict(sorted(source.bad_rows.items()))


def _described(counts: Counts) -> dict[str, int]:
    names = {"tokens": "conversation_tokens"}  # `tokens` are those of the training, padding included
    return {names.get(name, name): value for name, value in asdict(counts).items() if name != "named"}


def _one_machine() -> Machines:
    """The ranks of this machine. Others have joined the training before, and cannot join this one."""
    machines = find_machines()
    if machines.count > 1:
        tell("finetune: this stage uses this machine alone, also with PIPELIB_NNODES")
    return replace(machines, count=1, endpoint="")


def _require_rows(params: FinetuneParams, rows: int) -> None:
    if rows < params.rows_per_step:
        raise UserError(
            f"finetune.global_batch_tokens: {params.global_batch_tokens:,} tokens are {params.rows_per_step} rows per step, and "
            f"the conversations fill only {plural(rows, 'row')}, so some rows would be used twice in one step; lower it to "
            f"{max(1, rows) * params.sequence_length:,} or less, or add conversations."
        )


def _require_same_template(folder: Path, template: ChatTemplate) -> None:
    """Refuse a base that was tuned with another chat template: it would have to forget one to learn the other."""
    found = read_chat_template(folder)
    if found and found != template.jinja:
        raise UserError(
            f"finetune.init_from: {folder} has a chat template of its own, and conversations are written in another one here, so "
            "the model would mix both; start from a model that was not tuned for a chat, or remove the template from a copy of "
            "the folder."
        )


def _require_context(params: FinetuneParams, task: Finetuning) -> None:
    context = task.model.context_length
    if params.sequence_length > context:
        raise UserError(
            f"finetune.sequence_length: {params.sequence_length} is longer than the context of the base ({context}), so it could "
            "not read a whole row; lower it."
        )


def _warn_of_untrained_markers(params: FinetuneParams, template: ChatTemplate, tokens: Path) -> None:
    """Say so if an adapter cannot learn the template's special tokens, because their embeddings are frozen as they were drawn."""
    if params.init_from != BASE:
        return
    counts = np.load(tokens / UNIGRAM_COUNTS)
    if untrained := [number for number in template.marker_token_ids if not counts[number]]:
        tell(
            f"finetune: {len(untrained)} of the {len(template.marker_token_ids)} special tokens of the chat template never occur "
            "in the corpus, so their embeddings are random and an adapter leaves them so; finetune.adapter: null trains them",
            error=True,
        )


def _measure(
    params: FinetuneParams, base: Base, chat: Path, dataset: Dataset, template: ChatTemplate, tokens: Path
) -> tuple[dict[str, object], list[dict[str, str]]]:
    """Measure the answers of the new model, and both models on the corpus."""
    device = pick_device()
    model = import_model(chat, base.tokenizer, quiet=True).to(device)
    answered = answer_conversations(model, dataset, params, template)
    answers = answer_questions(model, params, template)
    result: dict[str, object] = {
        "answers": {
            "count": answered.count,
            "ended": exact_share(answered.ended, answered.count),
            "exact": exact_share(answered.exact, answered.count),
        }
    }
    if read_manifest(tokens).tokenizer == base.tokenizer:
        before = corpus_bits_per_byte(base.read().to(device), tokens, base.tokenizer, params)
        after = corpus_bits_per_byte(model, tokens, base.tokenizer, params)
        if before is not None and after is not None:
            result["corpus_bits_per_byte"] = {"before": round(before, 6), "after": round(after, 6)}
    return result, answers
