"""Choose the tokenizer: the one that encodes the corpus, the one that made some tokens, the one of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import UserError, how_to_repair
from pipelib.files import read_json, write_json
from pipelib.vocabulary.folder import TOKENIZER, fingerprint, read_tokenizer
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.places import HERE, MANIFEST


@dataclass(frozen=True)
class Vocabulary:
    """What the vocabulary stage makes."""

    tokenizer: Tokenizer
    validation_documents: int | None
    """Documents at the start of the corpus that are the validation split; None if the first shard is, as for GPT-2's."""


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write the manifest of a folder that has the other files of a vocabulary; GPT-2's has no other file."""
    tokenizer = vocabulary.tokenizer
    more = {"validation_documents": vocabulary.validation_documents}
    write_json(
        folder / MANIFEST,
        {
            **tokenizer.encoding,
            "size": tokenizer.size,
            "end_token_id": tokenizer.end_token_id,
            **({} if vocabulary.validation_documents is None else more),
        },
    )


def read_vocabulary(folder: Path = HERE.vocabulary) -> Vocabulary:
    """Read what the vocabulary stage made.

    Raises:
        UserError: it is missing, or its files are not those of its manifest.
    """
    manifest = read_json(folder / MANIFEST)
    documents = manifest.get("validation_documents")
    encoding = {key: manifest.get(key) for key in GPT2_TOKENIZER.encoding}
    tokenizer = GPT2_TOKENIZER if encoding == GPT2_TOKENIZER.encoding else read_tokenizer(folder)
    if tokenizer.encoding != encoding:
        raise UserError(
            f"{folder / TOKENIZER} is not the vocabulary of its {MANIFEST}, so every token could be wrong; "
            f"{how_to_repair(str(folder))}."
        )
    return Vocabulary(tokenizer, documents if isinstance(documents, int) else None)


def chosen_tokenizer() -> Tokenizer:
    """Return the tokenizer that encodes the corpus: that of data/vocabulary, or GPT-2's before the stage has run."""
    return read_vocabulary().tokenizer if (HERE.vocabulary / MANIFEST).is_file() else GPT2_TOKENIZER


def find_tokenizer(encoding: Mapping[str, object], *folders: Path) -> Tokenizer:
    """Return the tokenizer that the `encoding` of a manifest of shards names.

    Args:
        folders: of vocabularies, besides data/vocabulary.

    Raises:
        UserError: there is no such tokenizer.
    """
    known = [GPT2_TOKENIZER]
    if encoding != GPT2_TOKENIZER.encoding:
        there = [folder for folder in (HERE.vocabulary, *folders) if (folder / MANIFEST).is_file()]
        known += [read_vocabulary(folder).tokenizer for folder in there]
    for tokenizer in known:
        if tokenizer.encoding == encoding:
            return tokenizer
    name, sha256 = encoding.get("name"), str(encoding.get("vocabulary_sha256"))[:16]
    here = ", ".join(dict.fromkeys(f"{tokenizer.name} ({tokenizer.fingerprint[:16]})" for tokenizer in known))
    raise UserError(
        f"the tokens need the vocabulary {name} ({sha256}), and only {here} is available, so they cannot be decoded; run dvc "
        "repro to make the tokens again."
    )


def published_tokenizer() -> Tokenizer:
    """Return the tokenizer of the models that OpenAI published."""
    return GPT2_TOKENIZER


def tokenizer_of_model(folder: Path, otherwise: Tokenizer) -> Tokenizer:
    """Return the tokenizer in a model's folder.

    Args:
        otherwise: what a model without a tokenizer has, or one whose tokenizer cannot be read here; checks follow that say more.
    """
    try:
        if not (folder / TOKENIZER).is_file():
            is_gpt2s = (folder / "vocab.json").is_file() or folder.absolute().parent == HERE.published_models.absolute()
            return GPT2_TOKENIZER if is_gpt2s else otherwise
        found = read_tokenizer(folder)
        rows = read_json(folder / "config.json").get("vocab_size")
    except (UserError, OSError, ValueError):  # the last two: a name that no file can have
        return otherwise
    # Tokens that were added without rows in the embedding, [PAD] for example, are not the model's.
    has_no_more = isinstance(rows, int) and rows <= GPT2_TOKENIZER.padded_size
    is_gpt2s = has_no_more and not found.normalizer and found.ranks() == GPT2_TOKENIZER.ranks()
    return GPT2_TOKENIZER if is_gpt2s else found


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer is GPT-2's, without tokens added to it."""
    gpt2 = GPT2_TOKENIZER
    own = fingerprint(gpt2.ranks(), gpt2.pre_tokenizer, gpt2.special_tokens, gpt2.end_token_id)
    return tokenizer.fingerprint == own
