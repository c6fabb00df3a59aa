"""Generate text token by token. Each text has its own random generator, so sampling changes no other random number."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.decoder import Decoder
from pipelib.model.device import attention_of_any_shape
from pipelib.model.kv_cache import KVCache
from pipelib.schema import MAX_INT
from pipelib.vocabulary.tokenizer import Tokenizer

COLD = 1e-30
"""fp32 cannot hold numbers much smaller than this; a temperature below it is 0."""
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
        if not 0.01 <= self.repetition_penalty <= 100:
            return (
                f"repetition_penalty {self.repetition_penalty:g} is not a number from 0.01 to 100, so tokens of the text "
                "would be lost; use 1 for none, or 1.1."
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
        if self.temperature < COLD:
            return int(logits.argmax())
        if self._keeps_all(len(logits)):  # to sort 50,000 tokens, or torch.multinomial on them, takes milliseconds
            shares = ((logits - logits.max()) / self.temperature).softmax(dim=-1).double().cumsum(dim=-1)
            place = torch.rand((), dtype=torch.float64, generator=generator) * shares[-1]
            return int(torch.searchsorted(shares, place, right=True).clamp(max=len(logits) - 1))
        token_ids, probabilities = self.candidates(logits)
        return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])

    def _penalised(self, logits: Tensor, text: Sequence[int]) -> Tensor:
        if self.repetition_penalty == 1:
            return logits
        seen = torch.tensor(sorted(set(text)))
        scores, penalty = logits[seen], self.repetition_penalty
        return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))

    def _keeps_all(self, size: int) -> bool:
        """Whether any of `size` tokens may be drawn."""
        return (self.top_k or size) >= size and self.top_p in (None, 1) and not self.min_p

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn, the likeliest first, and numbers in proportion to their probabilities."""
        values, token_ids = logits.topk(min(self.top_k or len(logits), len(logits)))
        probabilities = ((values - values[0]) / self.temperature).softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities  # the probability of all likelier tokens together
            before[0] = 0.0
            probabilities = probabilities.where(before < max(self.top_p, COLD), 0.0)  # multinomial normalises
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
    texts = [
        Text(list(prompt), new_tokens, sampling, torch.Generator().manual_seed(seed + number), stops, ends)
        for number, prompt in enumerate(prompts)
    ]
    return _stream(Batch(model, min(BATCH, len(texts)), _columns(model, texts)), texts) if texts else iter(())


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


def _stream(batch: "Batch", texts: Sequence["Text"]) -> Iterator[tuple[int, int]]:
    numbers, waiting = {text: number for number, text in enumerate(texts)}, deque(texts)
    while waiting or batch.texts:
        while waiting and len(batch.texts) < batch.size:
            batch.add(waiting.popleft())
        if batch.texts:  # none if no tokens are wanted
            yield from ((numbers[text], token) for text, token in batch.step() if token is not None)


def _columns(model: Decoder, texts: Sequence["Text"]) -> int:
    """Columns that the cache needs for texts of these lengths."""
    return min(max(len(text.token_ids) + text.most for text in texts), model.params.context_length)


@dataclass(eq=False)
class Text:
    """A text that is written."""

    token_ids: list[int]
    """Its tokens, at first those of the prompt."""
    most: int
    """The most new tokens."""
    sampling: Sampling
    generator: torch.Generator
    stops: Collection[int] = ()
    """It ends before any of these."""
    ends: Ends | None = None
    """It ends after a token if this is true of its new tokens."""
    written: int = 0
    """New tokens so far."""
    finished: Literal["", "stop", "length"] = ""
    """Why it has ended; empty if it has not."""

    def draw(self, logits: Tensor) -> int | None:
        """Draw a token, and add it, but for one that ends the text.

        Args:
            logits: (vocab_size,), on the CPU.

        Returns:
            The token; None if the text ends before it.
        """
        token = self.sampling.draw(logits, self.token_ids, self.generator)
        if token in self.stops:
            self.finished = "stop"
            return None
        self.token_ids.append(token)
        self.written += 1
        if self.ends and self.ends(self.token_ids[-self.written :]):
            self.finished = "stop"
        elif self.written == self.most:
            self.finished = "length"
        return token


class Batch:
    """Texts that are written together, one token each in a step. Others may join between two steps."""

    def __init__(self, model: Decoder, size: int, columns: int, *, fixed_shapes: bool = False) -> None:
        """Args:
        size: the most texts at a time.
        columns: see `KVCache`, as for `fixed_shapes`.
        """
        self.size = size
        self._model, self._cache = model, KVCache(model, size, columns, fixed_shapes=fixed_shapes)
        self._new: list[Text] = []
        self._cached: list[Text] = []
        """The text in each row of the cache."""
        self._long: list[Text] = []
        """Those that have outgrown the context: all their positions change with each token, so no cache helps."""

    @property
    def texts(self) -> list[Text]:
        """Those that have not ended."""
        return [*self._cached, *self._long, *self._new]

    def add(self, text: Text) -> None:
        """Let a text join. There must be fewer than `size`."""
        if text.most:
            self._new.append(text)

    def remove(self, text: Text) -> None:
        """Let a text leave before it has ended."""
        if text in self._cached:
            self._leave_cache(self._cached.index(text))
        for texts in (self._long, self._new):
            if text in texts:
                texts.remove(text)

    def step(self) -> list[tuple[Text, int | None]]:
        """Draw one token for each text; None where a text ends before it. Those that have ended leave.

        Raises:
            UserError: logits are infinite or NaN.
        """
        with torch.no_grad(), attention_of_any_shape(self._model.device):
            logits = self._next_logits()
        drawn = [(text, text.draw(row[: self._model.vocab_size])) for text, row in logits]
        context = self._model.params.context_length
        self._long += [text for text in self._cached if not text.finished and len(text.token_ids) > context]
        self._long = [text for text in self._long if not text.finished]
        for row, text in reversed([*enumerate(self._cached)]):
            if text.finished or len(text.token_ids) > context:
                self._leave_cache(row)
        return drawn

    def _next_logits(self) -> list[tuple[Text, Tensor]]:
        """The logits of every text's next token, (padded vocab_size,) each, in fp32 on the CPU."""
        context, parts = self._model.params.context_length, []
        if self._cached:
            parts.append(self._cache.step([text.token_ids[-1] for text in self._cached]))
        if joining := [text for text in self._new if len(text.token_ids) <= context]:
            parts.append(self._cache.add([text.token_ids for text in joining]))
            self._cached += joining
        self._long += [text for text in self._new if text not in joining]
        self._new = []
        if self._long:
            windows = torch.tensor([text.token_ids[-context:] for text in self._long], device=self._model.device)
            parts.append(self._model.exact_logits(self._model.hidden(windows)[:, -1]))
        return list(zip([*self._cached, *self._long], torch.cat(parts).cpu(), strict=True))

    def _leave_cache(self, row: int) -> None:
        """Free a row. The last text takes it, as in the cache."""
        self._cache.remove(row)
        self._cached[row] = self._cached[-1]
        self._cached.pop()
