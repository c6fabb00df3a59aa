"""Generate text token by token. Each text has its own random generator, so sampling changes no other random number."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.decoder import Decoder
from pipelib.model.device import attention_of_any_shape
from pipelib.model.kv_cache import KVCache
from pipelib.schema import MAX_INT

BATCH = 16
"""Texts that are generated together. For GPT-2 124M, the keys and values of a full context take 75 MB per text in fp32."""


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    stop_token_id: int | None = None,
) -> list[list[int]]:
    """Continue prompts, several at a time; see `stream` for the arguments.

    Returns:
        The new token ids of each prompt.

    Raises:
        UserError: as `stream` does.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(
        model,
        prompts,
        new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_token_id=stop_token_id,
    ):
        texts[row].append(token)
    return texts


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int = 0,
    stop_token_id: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue prompts, several at a time, and yield each token when it is drawn: (number of the prompt, token id).

    A new token costs one position while its text fits the context. After that the model sees the last `context_length` tokens;
    all their positions change with each token, so all are computed again.

    Args:
        prompts: token ids of each prompt, at least one; the end token alone to start from nothing.
        new_tokens: the most tokens to add to each prompt.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw only among this many likeliest tokens; None for all. The padding of the vocabulary is never drawn.
        top_p: of those, draw among the fewest likeliest that together have this probability; None for all.
        seed: the seed of the first text; each further text has the next one. So texts depend on each other only through
            rounding, which changes with the batch size: little in fp32, but in bf16 enough to change a close draw.
        stop_token_id: end a text before this token.

    Raises:
        UserError: at once for an empty prompt or an invalid temperature, top_k, top_p or seed; with the first token for logits
            that are infinite or NaN.
    """
    # Checked here and not in `_stream`, where a generator would raise only when the first token is asked for.
    if not all(prompts):
        raise UserError("the prompt is empty, so there is nothing to continue; give a word, or <|endoftext|> alone.")
    if not 0 <= temperature < math.inf:
        wrong = "is negative, which would prefer unlikely tokens" if temperature < 0 else "is not a finite number"
        raise UserError(f"temperature {temperature:g} {wrong}; use 0 or more.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} leaves no token to draw; use 1 or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(
            f"top_p {top_p:g} is not a probability above 0, so no token can be drawn; use more than 0 and at most 1."
        )
    if not 0 <= seed <= MAX_INT:
        raise UserError(
            f"seed {seed} is out of range for torch's generators, so no text could be drawn; use 0 to {MAX_INT}."
        )
    draw = partial(_draw, vocab_size=model.vocab_size, temperature=temperature, top_k=top_k, top_p=top_p)
    return _stream(model, prompts, new_tokens, draw, seed, stop_token_id)


@torch.no_grad()
def _stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draw: Callable[[Tensor, torch.Generator], int],
    seed: int,
    stop_token_id: int | None,
) -> Iterator[tuple[int, int]]:
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(texts))]
    for first in range(0, len(texts), BATCH):
        numbers = range(first, min(first + BATCH, len(texts)))
        cache = KVCache(model, _columns(model, [len(texts[number]) for number in numbers], new_tokens))
        unfinished = {number: texts[number] for number in numbers}
        for _ in range(new_tokens):
            if not unfinished:
                break
            with attention_of_any_shape(model.device):
                next_logits = _next_logits(model, unfinished, cache)
            for number, logits in next_logits.items():
                token = draw(logits, generators[number])
                if token == stop_token_id:
                    del unfinished[number]
                else:
                    texts[number].append(token)
                    yield number, token


def _columns(model: Decoder, lengths: Sequence[int], new_tokens: int) -> int:
    """Columns that the cache needs for texts of these lengths, until they end or outgrow the context."""
    context = model.params.context_length
    fitting = [length for length in lengths if length <= context]
    return min(max(fitting) + new_tokens, max(fitting) - min(fitting) + context) if fitting else 0


def _next_logits(model: Decoder, texts: dict[int, list[int]], cache: KVCache) -> dict[int, Tensor]:
    """The logits of every text's next token, (padded vocab_size,) each, in fp32 on the CPU."""
    # Texts longer than the context cannot use the cache: their positions shift with every token.
    context = model.params.context_length
    short = {number: text for number, text in texts.items() if len(text) <= context}
    long = {number: text[-context:] for number, text in texts.items() if len(text) > context}
    hidden = [cache.last_hidden(short)] if short else []
    if long:
        windows = torch.tensor(list(long.values()), device=model.device)
        hidden.append(model.hidden(windows)[:, -1])
    return dict(zip([*short, *long], model.exact_logits(torch.cat(hidden)).cpu(), strict=True))


def _draw(
    logits: Tensor,
    generator: torch.Generator,
    vocab_size: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> int:
    """Draw one token id from logits (padded vocab_size,), whose padding is minus infinity."""
    if not logits[:vocab_size].isfinite().all():
        raise UserError(
            "the model's logits are infinite or not numbers, so no token can be drawn; its weights are damaged or its "
            "training diverged: use another model."
        )
    if temperature == 0:
        return int(logits.argmax())
    values, token_ids = logits.topk(min(top_k or vocab_size, vocab_size))
    probabilities = ((values - values[0]) / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities  # the probability of all likelier tokens together
        probabilities = probabilities.where(before < top_p, 0.0)  # multinomial normalises
    return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])
