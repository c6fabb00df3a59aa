"""What fine-tuning changed: answers to conversations that were held out, and what the model has forgotten."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelib.evaluation.loss import summed_loss
from pipelib.finetuning.dataset import Dataset
from pipelib.finetuning.params import FinetuneParams
from pipelib.model.decoder import Decoder
from pipelib.model.device import inference
from pipelib.model.generate import GREEDY, generate
from pipelib.tokens.loader import validation_batches
from pipelib.tokens.shards import VALIDATION_SHARD, shard_tokens
from pipelib.vocabulary.chat import USER, ChatTemplate, Message
from pipelib.vocabulary.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answered:
    """How a model answered conversations."""

    count: int
    ended: int
    """Answers that ended by themselves within `answer_tokens` tokens."""
    exact: int
    """Answers that are the conversation's own, to the token."""


def answer_conversations(
    model: Decoder, dataset: Dataset, params: FinetuneParams, template: ChatTemplate, *, held_out: bool = True
) -> Answered:
    """Let the model write the last answer of conversations, taking the likeliest token each time.

    Those are measured whose own answer has at most `answer_tokens` tokens: the first `answers` of the split.
    """
    numbers = [
        number
        for number in dataset.numbers(held_out=held_out).tolist()
        if dataset.answers[number, 1] - dataset.answers[number, 0] <= params.answer_tokens
    ][: params.answers]
    prompts = [dataset.tokens(number)[: dataset.answers[number, 0]].tolist() for number in numbers]
    wanted = [dataset.tokens(number)[slice(*dataset.answers[number])].tolist() for number in numbers]
    found = answers_to(model, prompts, params, template)
    return Answered(
        len(numbers),
        sum(stopped for _, stopped in found),
        sum(stopped and tokens == answer[:-1] for (tokens, stopped), answer in zip(found, wanted, strict=True)),
    )


def answers_to(
    model: Decoder, prompts: Sequence[Sequence[int]], params: FinetuneParams, template: ChatTemplate
) -> list[tuple[list[int], bool]]:
    """The likeliest answer to each prompt, and whether it ended by itself."""
    with inference(model.device, params.precision):
        texts = generate(model, prompts, params.answer_tokens, GREEDY, stop_token_id=template.stop_token_ids)
    return [(tokens, len(tokens) < params.answer_tokens) for tokens in texts]


def answer_questions(model: Decoder, params: FinetuneParams, template: ChatTemplate) -> list[dict[str, str]]:
    """The model's answers to `finetune.questions`."""
    prompts = [template.prompt([Message(USER, question)]) for question in params.questions]
    texts = [template.tokenizer.decode(tokens) for tokens, _ in answers_to(model, prompts, params, template)]
    return [{"question": question, "answer": text} for question, text in zip(params.questions, texts, strict=True)]


def corpus_bits_per_byte(model: Decoder, tokens: Path, tokenizer: Tokenizer, params: FinetuneParams) -> float | None:
    """The loss on the start of the validation shard, in bits per byte of its text; None if the shard has no text.

    Args:
        tokens: the folder of the shards, in this tokenizer's tokens.
    """
    shard = tokens / VALIDATION_SHARD
    length = min(model.params.context_length, shard_tokens(shard) - 1, CORPUS_TOKENS)
    lengths = tokenizer.byte_lengths()
    batches = list(validation_batches(shard, length, 8, CORPUS_TOKENS)) if length > 0 else []
    text_bytes = sum(int(lengths[targets].sum()) for _, targets in batches)
    return summed_loss(model, batches, params.precision).bits_per_byte(text_bytes) if text_bytes else None


CORPUS_TOKENS = 32768
"""Tokens of the validation shard on which forgetting is measured."""


def exact_share(part: int, whole: int) -> float:
    """A share, 0 of nothing."""
    return round(part / whole, 4) if whole else 0.0


def some_numbers(dataset: Dataset, most: int) -> list[int]:
    """A few conversations to show, spread over the dataset."""
    return sorted({int(number) for number in np.linspace(0, len(dataset) - 1, most)})
