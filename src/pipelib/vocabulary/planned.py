"""The tokenizer that params.yaml asks for, before the vocabulary stage has run."""

from pathlib import Path

from pipelib.errors import UserError
from pipelib.vocabulary.choice import is_gpt2
from pipelib.vocabulary.folder import read_tokenizer
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.tokenizer import Tokenizer


def planned_tokenizer(params: VocabularyParams) -> Tokenizer | None:
    """Return the tokenizer that the parameters ask for; None if it has yet to be trained.

    Raises:
        UserError: they name a folder without a vocabulary that can be used.
    """
    if params.folder:
        found = read_tokenizer(Path(params.folder))
        _require_usable(found, params.folder)
        return found
    return GPT2_TOKENIZER if params.source == "gpt2" else None


def planned_size(params: VocabularyParams) -> int:
    """Return how many tokens the vocabulary has that the parameters ask for.

    Raises:
        UserError: they name a folder without a vocabulary that can be used.
    """
    tokenizer = planned_tokenizer(params)
    return tokenizer.size if tokenizer else params.vocab_size


def _require_usable(tokenizer: Tokenizer, folder: str) -> None:
    """Refuse the vocabulary of a folder if it is GPT-2's.

    Raises:
        UserError: with what to write instead.
    """
    if is_gpt2(tokenizer):
        raise UserError(
            f"vocabulary.source: {folder} has GPT-2's vocabulary, and only with vocabulary.source: gpt2 is the validation "
            "split that of published runs, so losses could not be compared with theirs; set vocabulary.source: gpt2."
        )
