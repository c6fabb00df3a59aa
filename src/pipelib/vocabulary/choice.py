"""Which tokenizer: the one that text is encoded with here, and the one that tokens were made with."""

from collections.abc import Mapping

from pipelib.errors import UserError
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer

KNOWN = (GPT2_TOKENIZER,)


def chosen_tokenizer() -> Tokenizer:
    """What tokenize encodes the corpus with, and so what a model that is planned here will read."""
    return GPT2_TOKENIZER


def find_tokenizer(encoding: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that the `encoding` of a manifest names.

    Raises:
        UserError: there is no such tokenizer.
    """
    for tokenizer in KNOWN:
        if tokenizer.encoding == encoding:
            return tokenizer
    name, fingerprint = encoding.get("name"), str(encoding.get("vocabulary_sha256"))[:16]
    known = ", ".join(f"{tokenizer.name} ({tokenizer.fingerprint[:16]})" for tokenizer in KNOWN)
    raise UserError(
        f"the tokens were made with the vocabulary {name} ({fingerprint}), and this code has {known}, so nobody could tell what "
        "text they stand for; run dvc repro to make them again."
    )
