"""The tokenizer that params.yaml asks for, before the vocabulary stage has run."""

from pathlib import Path

from pipelib.vocabulary.folder import read_tokenizer
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.tokenizer import Tokenizer


def planned_tokenizer(params: VocabularyParams) -> Tokenizer | None:
    """Return the tokenizer that the parameters ask for; None if it has yet to be trained.

    Raises:
        UserError: they name a folder without a vocabulary.
    """
    if params.folder:
        return read_tokenizer(Path(params.folder))
    return GPT2_TOKENIZER if params.source == "gpt2" else None


def planned_size(params: VocabularyParams) -> int:
    """Return how many tokens the vocabulary has that the parameters ask for.

    Raises:
        UserError: they name a folder without a vocabulary.
    """
    tokenizer = planned_tokenizer(params)
    return tokenizer.size if tokenizer else params.size
