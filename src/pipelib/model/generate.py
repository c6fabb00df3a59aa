"""Text from a model, token by token, with a random stream of its own: sampling changes nothing else that is random."""

import torch
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.gpt import GPT
from pipelib.model.vocabulary import VOCAB_SIZE


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = 50,
    seed: int = 0,
    stop_token_id: int | None = None,
) -> list[int]:
    """Continue a prompt.

    Args:
        prompt: token ids, at least one; `<|endoftext|>` for a text from nothing.
        new_tokens: how many to add at most.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among this many likeliest tokens only; None for all. The padding of the vocabulary is never drawn.
        seed: of this text's own random stream.
        stop_token_id: end before this token.

    Returns:
        The new token ids alone.

    Raises:
        UserError: an empty prompt, or a temperature or top_k that means nothing.
    """
    if not prompt:
        raise UserError("the prompt is empty, so there is nothing to go on from; give a word, or <|endoftext|> alone.")
    if temperature < 0:
        raise UserError(f"temperature {temperature:g} is negative, which would prefer unlikely tokens; use 0 or more.")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k} leaves no token to draw; use 1 or more.")
    device = model.wte.weight.device
    generator = torch.Generator().manual_seed(seed)
    token_ids = list(prompt)
    for _ in range(new_tokens):
        window = torch.tensor([token_ids[-model.params.context_length :]], device=device)
        logits = model.logits(model.hidden(window)[0, -1]).float().cpu()
        token = _draw(logits, temperature, top_k, generator)
        if token == stop_token_id:
            break
        token_ids.append(token)
    return token_ids[len(prompt) :]


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One token id from the logits (PADDED_VOCAB_SIZE,), whose padding is minus infinity."""
    if temperature == 0:
        return int(logits.argmax())
    values, token_ids = logits.topk(min(top_k or VOCAB_SIZE, VOCAB_SIZE))
    probabilities = (values / temperature).softmax(dim=-1)
    return int(token_ids[torch.multinomial(probabilities, 1, generator=generator)])
