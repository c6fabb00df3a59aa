"""Corpora small enough for a test: words and what is hard for tokenizers, always the same; and shards of given tokens."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelib.files import sha256_file, write_json
from pipelib.tokens.shards import Shard, shard_name, write_shard
from pipelib.vocabulary.engines import HARD_STRINGS
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.tokenizer import Tokenizer, Tokens

WORDS = [
    "the", "of", "and", "in", "to", "model", "data", "gradient", "tokens", "Learning", "3.14", "naïve", "don't", "東京", "x=1;",
    "\n\n", "function()", "<|endoftext|>",
]  # fmt: skip

CHARACTERS = (
    "的一是不了人我在有他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能好都然没日于起还发"
    "成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿"
)
"""Common Chinese characters."""


def make_novel(paragraphs: int, between: str = "\n", seed: int = 0) -> str:
    """Chinese text without a space: paragraphs of random characters with punctuation, 100 of them about 30 KB."""
    draw = random.Random(seed)
    return between.join(
        "，".join("".join(draw.choices(CHARACTERS, k=draw.randint(4, 12))) for _ in range(draw.randint(5, 16))) + "。"
        for _ in range(paragraphs)
    )


def make_texts(count: int, words: int = 100, seed: int = 0) -> list[str]:
    """Documents of `words` words, each of them different from all others, with a hard string in every tenth."""
    draw = random.Random(seed)
    hard = ["" if number % 10 else HARD_STRINGS[number % len(HARD_STRINGS)] for number in range(count)]
    return [f"document {number}: {' '.join(draw.choices(WORDS, k=words))}{hard[number]}" for number in range(count)]


def write_raw_files(folder: Path, files: Sequence[Sequence[str | None]], row_group_rows: int = 1000) -> Path:
    """data/raw as download leaves it: parquet files in the order of the corpus, and their manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, texts in enumerate(files):
        path = folder / f"{number:03d}_00000.parquet"
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=row_group_rows)
        lines.append({"name": path.name, "bytes": path.stat().st_size, "rows": len(texts), "sha256": sha256_file(path)})
    write_json(folder / "manifest.json", {"source": {"kind": "test"}, "files": lines, "documents": 0})
    return folder


def write_jsonl(path: Path, texts: Sequence[str]) -> None:
    """A file for the `local` source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_shards(
    folder: Path, pieces: Sequence[Tokens], shard_tokens: int, tokenizer: Tokenizer = GPT2_TOKENIZER
) -> list[Shard]:
    """Shards of `shard_tokens` tokens of these arrays, one after the other."""
    tokens = np.concatenate([np.zeros(0, np.uint16), *pieces])
    parts = [tokens[start : start + shard_tokens] for start in range(0, len(tokens), shard_tokens)]
    return [
        write_shard(folder / shard_name(index), len(part), [part], tokenizer)[0] for index, part in enumerate(parts)
    ]
