"""What a model writes: the same text for the same model, prompt and seed."""

from collections.abc import Sequence

from pipelib.model.device import autocast
from pipelib.model.generate import generate
from pipelib.model.gpt import GPT
from pipelib.model.vocabulary import EOT_TOKEN_ID
from pipelib.tokens.encoding import tiktoken_encoding

SAMPLE_TOKENS = 64


def write_samples(model: GPT, prompts: Sequence[str], precision: str, seed: int) -> list[tuple[str, str]]:
    """(prompt, continuation) of every prompt, up to `SAMPLE_TOKENS` tokens or the end of the text.

    Each has a random stream of its own, so that nothing else that is random changes.
    """
    if not prompts:
        return []
    encoding = tiktoken_encoding()
    token_ids = [[EOT_TOKEN_ID, *encoding.encode_ordinary(prompt)] for prompt in prompts]
    with autocast(model.wte.weight.device, precision):
        texts = generate(model, token_ids, SAMPLE_TOKENS, seed=seed, stop_token_id=EOT_TOKEN_ID)
    return [(prompt, encoding.decode(new)) for prompt, new in zip(prompts, texts, strict=True)]
