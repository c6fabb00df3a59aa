"""Choose the tokenizer: the one that encodes text here, or the one that made some tokens."""

from collections.abc import Mapping

from pipelib.errors import UserError
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer

KNOWN = (GPT2_TOKENIZER,)


def chosen_tokenizer() -> Tokenizer:
    """Return the tokenizer that encodes the corpus, and that a newly trained model will use."""
    return GPT2_TOKENIZER


def find_tokenizer(encoding: Mapping[str, object]) -> Tokenizer:
    """Return the tokenizer that the `encoding` of a manifest names.

    Raises:
        UserError: there is no such tokenizer.
    """
    for tokenizer in KNOWN:
        if tokenizer.encoding == encoding:
            return tokenizer
    name, fingerprint = encoding.get("name"), str(encoding.get("vocabulary_sha256"))[:16]
    known = ", ".join(f"{tokenizer.name} ({tokenizer.fingerprint[:16]})" for tokenizer in KNOWN)
    raise UserError(
        f"the tokens were made with the vocabulary {name} ({fingerprint}), and this code has {known}, so they cannot be "
        "decoded; run dvc repro to make them again."
    )
