"""What a model writes: the same text for the same model, prompt and seed."""

from collections.abc import Sequence

from pipelib.model.decoder import Decoder
from pipelib.model.device import autocast
from pipelib.model.generate import generate
from pipelib.vocabulary.tokenizer import Tokenizer

SAMPLE_TOKENS = 64


def write_samples(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], precision: str, seed: int
) -> list[tuple[str, str]]:
    """(prompt, continuation) of every prompt, up to `SAMPLE_TOKENS` tokens or the end of the text.

    Each has a random stream of its own, so that nothing else that is random changes.
    """
    if not prompts:
        return []
    token_ids = [[tokenizer.end_token_id, *tokenizer.encode(prompt)] for prompt in prompts]
    with autocast(model.device, precision):
        texts = generate(model, token_ids, SAMPLE_TOKENS, seed=seed, stop_token_id=tokenizer.end_token_id)
    return [(prompt, tokenizer.decode(new)) for prompt, new in zip(prompts, texts, strict=True)]
