"""Generate text token by token. Each text has its own random generator, so sampling changes no other random number."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.decoder import Decoder
from pipelib.model.device import attention_of_any_shape
from pipelib.model.kv_cache import KVCache
from pipelib.schema import MAX_INT
from pipelib.vocabulary.tokenizer import Tokenizer

Ends = Callable[[Sequence[int]], bool]
"""Whether a text ends after its new tokens."""
BATCH = 16
"""Texts that are generated together. For GPT-2 124M, the keys and values of a full context take 75 MB per text in fp32."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits. transformers' generation computes the same."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int | None = 50
    """Draw only among this many likeliest tokens; None for all. The padding of the vocabulary is never drawn."""
    top_p: float | None = None
    """Of those, draw among the fewest likeliest that together have this probability; None for all."""
    min_p: float | None = None
    """Of those, draw among tokens with at least this share of the likeliest one's probability; None for all."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that are in the text already, its prompt included, and multiplies them if they are negative
    (Keskar et al., CTRL, 2019); 1 for none."""

    def problem(self) -> str:
        """What is wrong with a value, and the remedy; empty if nothing is."""
        if not 0 <= self.temperature < math.inf:
            negative = self.temperature < 0
            wrong = "is negative, which would prefer unlikely tokens" if negative else "is not a finite number"
            return f"temperature {self.temperature:g} {wrong}; use 0 or more."
        if self.top_k is not None and self.top_k < 1:
            return f"top_k {self.top_k} leaves no token to draw; use 1 or more."
        if self.top_p is not None and not 0 < self.top_p <= 1:
            return f"top_p {self.top_p:g} is not a probability above 0, so no token can be drawn; use more than 0 and at most 1."
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            return (
                f"min_p {self.min_p:g} is not a share from 0 to 1, so it could leave no token; use 0.05, for example."
            )
        if not 0 < self.repetition_penalty < math.inf:
            return (
                f"repetition_penalty {self.repetition_penalty:g} is not above 0, so tokens of the text would be lost; use 1 for "
                "none, or 1.1."
            )
        return ""

    def draw(self, logits: Tensor, text: Sequence[int], generator: torch.Generator) -> int:
        """Draw one token id.

        Args:
            logits: (vocab_size,), on the CPU.
            text: the tokens so far.
        """
        if not logits.isfinite().all():
            raise UserError(
                "the model's logits are infinite or not numbers, so no token can be drawn; its weights are damaged or its "
                "training diverged: use another model."
            )
        logits = self._penalised(logits, text)
        if self.temperature == 0:
            return int(logits.argmax())
        token_ids, probabilities = self.candidates(logits)
        return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])

    def _penalised(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        if self.repetition_penalty == 1:
            return logits
        seen = torch.tensor(sorted(set(text)))
        scores, penalty = logits[seen], self.repetition_penalty
        return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn, the likeliest first, and numbers in proportion to their probabilities."""
        values, token_ids = logits.topk(min(self.top_k or len(logits), len(logits)))
        probabilities = ((values - values[0]) / self.temperature).softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities  # the probability of all likelier tokens together
            probabilities = probabilities.where(before < self.top_p, 0.0)  # multinomial normalises
        if self.min_p:
            probabilities = probabilities.where(probabilities >= self.min_p * probabilities[0], 0.0)
        return token_ids, probabilities


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0)


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling = DEFAULT,
    *,
    seed: int = 0,
    stop_token_id: int | Collection[int] | None = None,
    ends: Ends | None = None,
) -> list[list[int]]:
    """Continue prompts, several at a time; see `stream` for the arguments.

    Returns:
        The new token ids of each prompt.

    Raises:
        UserError: as `stream` does.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(model, prompts, new_tokens, sampling, seed=seed, stop_token_id=stop_token_id, ends=ends):
        texts[row].append(token)
    return texts


def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling = DEFAULT,
    *,
    seed: int = 0,
    stop_token_id: int | Collection[int] | None = None,
    ends: Ends | None = None,
) -> Iterator[tuple[int, int]]:
    """Continue prompts, several at a time, and yield each token when it is drawn: (number of the prompt, token id).

    A new token costs one position while its text fits the context. After that the model sees the last `context_length` tokens;
    all their positions change with each token, so all are computed again.

    Args:
        prompts: token ids of each prompt, at least one; the end token alone to start from nothing.
        new_tokens: the most tokens to add to each prompt.
        sampling: how they are drawn.
        seed: the seed of the first text; each further text has the next one. So texts depend on each other only through
            rounding, which changes with the batch size: little in fp32, but in bf16 enough to change a close draw.
        stop_token_id: end a text before this token, or before any of these.
        ends: end a text after a token if this is true of its new tokens; see `at_strings`.

    Raises:
        UserError: at once for an empty prompt or an invalid argument; with the first token for logits that are infinite or NaN.
    """
    # Checked here and not in `_stream`, where a generator would raise only when the first token is asked for.
    if not all(prompts):
        raise UserError("the prompt is empty, so there is nothing to continue; give a word, or <|endoftext|> alone.")
    if problem := sampling.problem():
        raise UserError(problem)
    if not 0 <= seed <= MAX_INT:
        raise UserError(
            f"seed {seed} is out of range for torch's generators, so no text could be drawn; use 0 to {MAX_INT}."
        )
    stops = {stop_token_id} if isinstance(stop_token_id, int) else set(stop_token_id or ())
    return _stream(model, prompts, new_tokens, sampling, seed, stops, ends)


def at_strings(tokenizer: Tokenizer, strings: Sequence[str]) -> Ends:
    """Make what ends a text at any of these strings, for the argument `ends`. The text keeps the tokens that complete it."""
    longest = max((len(string.encode("utf-8")) for string in strings), default=0)

    def ends(tokens: Sequence[int]) -> bool:
        # The last token may be long; a string that ends before it was found one token earlier.
        tail, length = [tokens[-1]], 0
        for token in reversed(tokens[:-1]):
            if length >= longest:
                break
            tail.insert(0, token)
            length += len(tokenizer.decode_bytes([token]))
        return any(string in tokenizer.decode(tail) for string in strings)

    return ends


@torch.no_grad()
def _stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    sampling: Sampling,
    seed: int,
    stops: Collection[int],
    ends: Ends | None,
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
                token = sampling.draw(logits[: model.vocab_size], texts[number], generators[number])
                if token in stops:
                    del unfinished[number]
                    continue
                texts[number].append(token)
                yield number, token
                if ends and ends(texts[number][len(prompts[number]) :]):
                    del unfinished[number]


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
