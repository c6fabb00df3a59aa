"""Samples of a model's text. The same model, prompt and seed give the same text."""

from collections.abc import Sequence

from pipelib.model.decoder import Decoder
from pipelib.model.device import inference
from pipelib.model.generate import generate
from pipelib.vocabulary.tokenizer import Tokenizer

SAMPLE_TOKENS = 64


def write_samples(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], precision: str, seed: int
) -> list[tuple[str, str]]:
    """Continue every prompt by up to `SAMPLE_TOKENS` tokens, or to the end of the text.

    Each text has its own random generator, so that sampling changes no other random number.

    Returns:
        (prompt, continuation) of every prompt.
    """
    if not prompts:
        return []
    token_ids = [[tokenizer.end_token_id, *tokenizer.encode(prompt)] for prompt in prompts]
    with inference(model.device, precision):
        texts = generate(model, token_ids, SAMPLE_TOKENS, seed=seed, stop_token_id=tokenizer.end_token_id)
    return [(prompt, tokenizer.decode(new)) for prompt, new in zip(prompts, texts, strict=True)]
