"""Check that a model's folder has the tokenizer of our data: with another one, its tokens would mean other text."""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelib.errors import UserError
from pipelib.files import read_json
from pipelib.model.weights import restore
from pipelib.vocabulary.choice import published_tokenizer, tokenizer_of_model
from pipelib.vocabulary.folder import TOKENIZER, read_tokenizer
from pipelib.vocabulary.tokenizer import Tokenizer


def resize_command(tokenizer: Tokenizer) -> str:
    """The command that copies a model without the tokens that were added to its vocabulary; two folders come after it."""
    return (
        "python -c 'import sys, transformers; model = transformers.GPT2LMHeadModel.from_pretrained(sys.argv[1]); "
        f"model.resize_token_embeddings({tokenizer.size}); model.save_pretrained(sys.argv[2])'"
    )


def how_to_cut_off(folder: Path, tokenizer: Tokenizer) -> str:
    """The remedy for a model with more tokens than the vocabulary."""
    name, size = shlex.quote(str(folder)), tokenizer.size
    if not any(_vocabularies(folder)) and not any(_added(folder)):
        return (
            "it has no tokenizer, so it was taken for one of the data's vocabulary; put the files of its own beside it "
            "(tokenizer.json, or GPT-2's vocab.json and merges.txt)."
        )
    return (
        f"if it is {tokenizer.title}'s vocabulary with tokens added, `{resize_command(tokenizer)} {name} {name}-{size}` makes a "
        "copy without them; otherwise use another model."
    )


def require_same_tokens(folder: Path, rows: int, tokenizer: Tokenizer) -> None:
    """Refuse a folder that has a tokenizer other than ours. A folder without one is accepted.

    Args:
        rows: the rows of the token embedding; tokens beyond them do not count.

    Raises:
        UserError: with the tokens that differ.
    """
    ours: dict[str, int] = {}
    named: dict[int, str] = {}
    for path, vocabulary in _vocabularies(folder):
        ours = ours or _spellings(tokenizer)
        # Qwen's vocab.json has the ordinary tokens alone, and tokenizer.json has all.
        extra_file = path.name == "vocab.json" and (folder / TOKENIZER).is_file()
        absent = tokenizer.special_tokens.keys() - vocabulary.keys() if extra_file else set()
        differing = [token for token, number in ours.items() if vocabulary.get(token) != number and token not in absent]
        if differing:
            raise UserError(
                f"{path} is not {tokenizer.title}'s vocabulary ({len(differing):,} of {tokenizer.size:,} tokens differ, "
                f"for example {differing[0]!r}), so the model would mistake the data's tokens for others; use a model with "
                f"{tokenizer.title}'s tokenizer."
            )
        named |= {number: token for token, number in vocabulary.items() if type(number) is int}  # not True, which is 1
    named |= dict(_added(folder))
    extra = sorted((number, token) for number, token in named.items() if tokenizer.size <= number < rows)
    if extra:
        tokens = ", ".join(f"{token} = {number}" for number, token in extra[:5])
        raise UserError(
            f"{folder} has {len(extra)} tokens that {tokenizer.title} does not have ({tokens}), which our data never contains "
            f"and which would be lost; {how_to_cut_off(folder, tokenizer)}"
        )


def require_same_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a folder whose tokenizer has another fingerprint than one of our own.

    For GPT-2's, `require_same_tokens` says more.

    Raises:
        UserError: with both vocabularies.
    """
    if tokenizer == published_tokenizer():
        return
    found = tokenizer_of_model(folder, tokenizer)
    if found == tokenizer and (folder / TOKENIZER).is_file():
        read_tokenizer(folder)  # raises if it was taken for the data's because it cannot be read
    if found != tokenizer:
        source = "gpt2" if found == published_tokenizer() else str(folder)
        raise UserError(
            f"{folder} has another vocabulary ({found.title}, {found.fingerprint[:16]}) than the data's "
            f"({tokenizer.title}, {tokenizer.fingerprint[:16]}), so the model would mistake the data's tokens for others; use a "
            f"model with the data's, or set vocabulary.source: {source}."
        )


def _spellings(tokenizer: Tokenizer) -> dict[str, int]:
    """Each token's id by its spelling in Hugging Face's files."""
    files = tokenizer.files(0)
    if "vocab.json" in files:
        spelled: dict[str, int] = json.loads(files["vocab.json"])
        return spelled
    return _all_tokens(json.loads(files[TOKENIZER]))


def _all_tokens(value: dict[str, Any]) -> dict[str, Any]:
    """The ids in the content of a tokenizer.json, those of added tokens included."""
    model, added = value.get("model"), value.get("added_tokens")
    found = model.get("vocab") if isinstance(model, dict) else None
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    more = {str(entry.get("content")): entry.get("id") for entry in entries}
    return {**(found if isinstance(found, dict) else {}), **more}


def _vocabularies(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each file with a vocabulary, and its token ids by token."""
    if (path := folder / "vocab.json").is_file():
        yield path, read_json(path, restore(folder))
    if (path := folder / "tokenizer.json").is_file():
        yield path, _all_tokens(read_json(path, restore(folder)))


def _added(folder: Path) -> Iterator[tuple[int, str]]:
    """The tokens that were added to the vocabulary: (id, text)."""
    if (path := folder / "added_tokens.json").is_file():
        for token, number in read_json(path, restore(folder)).items():
            if type(number) is int:
                yield number, token
    if (path := folder / "tokenizer.json").is_file():
        listed = read_json(path, restore(folder)).get("added_tokens")
        for entry in listed if isinstance(listed, list) else ():
            if isinstance(entry, dict) and type(entry.get("id")) is int:
                yield entry["id"], str(entry.get("content"))
