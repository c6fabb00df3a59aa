"""Train byte-level BPE with Hugging Face's `tokenizers`.

Equal texts give equal bytes, for any number of threads and any order of the texts. Ids: 256 bytes in GPT-2's order, the merges
in theirs, the special tokens. So ids are ranks, without a gap, as tiktoken and gigatoken want them.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pipelib.errors import UserError
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.tokenizer import END, PATTERNS, byte_characters

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_BATCH = 1000


def train_bpe(texts: Iterable[str], params: VocabularyParams) -> bytes:
    """Train a vocabulary, and return its tokenizer.json.

    Raises:
        UserError: the texts have fewer pairs to merge than `size` needs, or a special token is an ordinary one too.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer_of(params.pre_tokenizer), ByteLevel()
    special = [END, *params.special_tokens]
    ordinary = params.vocab_size - len(special)
    # Trained without special tokens, since they would take the first ids.
    trainer = BpeTrainer(
        vocab_size=ordinary, min_frequency=2, initial_alphabet=list(byte_characters()), show_progress=False
    )
    tokenizer.train_from_iterator(_batches(texts), trainer)
    _require_size(tokenizer, ordinary, params.vocab_size)
    _require_free(tokenizer, special)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return str(tokenizer.to_str(pretty=True)).encode("utf-8")


def pre_tokenizer_of(name: str) -> "PreTokenizer":
    """Return the pre-tokenizer of a name in `PATTERNS`, as `tokenizers` has it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    if name == "gpt2":  # built in
        return ByteLevel(add_prefix_space=False, use_regex=True)
    return Sequence([Split(Regex(PATTERNS[name]), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _require_size(tokenizer: "HuggingFaceTokenizer", ordinary: int, size: int) -> None:
    found = tokenizer.get_vocab_size()
    if found < ordinary:
        most = size - (ordinary - found)
        raise UserError(
            f"vocabulary.vocab_size: {size:,} tokens are more than the text can give ({most:,}: every pair that occurs twice "
            f"is merged), so some would never occur; set it to {most:,} or less, or add text."
        )


def _require_free(tokenizer: "HuggingFaceTokenizer", special: list[str]) -> None:
    character_of = {byte: character for character, byte in byte_characters().items()}
    for token in special:
        spelled = "".join(character_of[byte] for byte in token.encode("utf-8"))
        if tokenizer.token_to_id(spelled) is not None:
            raise UserError(
                f"vocabulary.special_tokens: {token!r} occurs in the text so often that it became an ordinary token, so the two "
                "could not be told apart; use another spelling, or clean the text."
            )
        if tokenizer.token_to_id(token) is not None:  # it is how the file writes one: é stands for a byte
            raise UserError(
                f"vocabulary.special_tokens: {token!r} is how tokenizer.json writes an ordinary token, so the two could not be "
                "told apart; use another spelling, such as <|name|>."
            )
