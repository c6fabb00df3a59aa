"""The vocabulary stage: GPT-2's vocabulary, one trained on the corpus, or that of a folder; and how well it compresses."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelib.errors import UserError, tell
from pipelib.files import format_bytes, write_atomic
from pipelib.progress import Progress
from pipelib.stage import Build, WorkResult
from pipelib.vocabulary.bpe import train_bpe
from pipelib.vocabulary.choice import Vocabulary, write_vocabulary
from pipelib.vocabulary.engines import HARD_STRINGS, assert_same_tokens, load_engine
from pipelib.vocabulary.folder import CONFIG, TOKENIZER, model_files, read_tokenizer, tiktoken_lines
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER
from pipelib.vocabulary.params import VocabularyParams
from pipelib.vocabulary.planned import planned_tokenizer
from pipelib.vocabulary.sample import HeldOut, held_out, training_texts
from pipelib.vocabulary.tokenizer import END, Tokenizer
from pipelib.workspace.places import Places

RANKS, TOKEN_BYTES = "vocabulary.tiktoken", "token_bytes.npy"
"""The ordinary tokens in tiktoken's format, and how many bytes of text each token stands for: for other trainers."""
MEASURED_BYTES, PROVED_BYTES = 10_000_000, 1_000_000
"""The held-out text that compression is measured on, and on which the engines are compared."""
MIN_KIND = 20
"""Fewer documents of a kind are not listed by themselves."""


def make_vocabulary(build: Build, params: VocabularyParams, raw: Path, benchmark_documents: int) -> WorkResult:
    """Make `data/vocabulary`, and return the stage's result and speed.

    Args:
        raw: the corpus; not read for GPT-2's vocabulary.
        benchmark_documents: documents at the start of the corpus that a benchmark is made of.

    Raises:
        UserError: the corpus is too small for the vocabulary, or the folder has none that can be used.
    """
    out = Places(build.outs).vocabulary
    out.mkdir(parents=True)
    if params.source == "gpt2":
        write_vocabulary(out, Vocabulary(GPT2_TOKENIZER, None))
        return {"name": GPT2_TOKENIZER.name, "size": GPT2_TOKENIZER.size}, {}
    documents, count = _keep_first(held_out(raw, params, benchmark_documents))
    sample: dict[str, int] = {}
    if params.source == "train":
        path, end = out / TOKENIZER, END
        content, sample = _train(raw, params, count)
    else:
        given = planned_tokenizer(params)
        assert given is not None
        end = next(token for token, number in given.special_tokens.items() if number == given.end_token_id)
        path, content = out / TOKENIZER, (Path(params.folder) / TOKENIZER).read_bytes()
    with write_atomic(path) as file:
        file.write(content)
    with write_atomic(out / CONFIG) as file:
        file.write(model_files(path, end, None)[CONFIG])
    tokenizer = read_tokenizer(out)
    with write_atomic(out / RANKS) as file:
        file.write(tiktoken_lines(tokenizer.ranks()))
    with write_atomic(out / TOKEN_BYTES) as file:
        np.save(file, tokenizer.byte_lengths())
    require_same_engines(tokenizer, out, _first(documents, PROVED_BYTES))
    write_vocabulary(out, Vocabulary(tokenizer, count))
    result = {
        **tokenizer.encoding,
        "size": tokenizer.size,
        "validation_documents": count,
        **sample,
        **compare_compression(tokenizer, documents),
    }
    return result, {}


def _train(raw: Path, params: VocabularyParams, skip: int) -> tuple[bytes, dict[str, int]]:
    """Train, and return tokenizer.json and what it was trained on."""
    counts = {"training_documents": 0, "training_bytes": 0}
    found = training_texts(raw, skip, params.max_bytes)
    first = next(found, None)
    if first is None:
        raise UserError(
            f"the corpus has no text behind the {skip} documents of the validation split, so no vocabulary can be trained; add "
            "text, or hold fewer documents out (vocabulary.validation_documents, download.validation, "
            "download.benchmark_documents)."
        )
    progress = Progress("vocabulary: reading text", None, "bytes")

    def texts() -> Iterator[str]:
        for text in chain([first], found):
            size = len(text.encode("utf-8"))
            counts["training_documents"] += 1
            counts["training_bytes"] += size
            progress.add(size)
            yield text
        progress.close()
        tell(f"vocabulary: training {params.vocab_size:,} tokens on {format_bytes(counts['training_bytes'])} of text")

    return train_bpe(texts(), params), counts


def require_same_engines(tokenizer: Tokenizer, folder: Path, texts: Iterable[HeldOut]) -> None:
    """Compare what `tokenizers`, tiktoken and gigatoken make of hard strings and of held-out text.

    Raises:
        UserError: they differ; names the text.
    """
    from tokenizers import Tokenizer as HuggingFaceTokenizer

    strings = [*HARD_STRINGS, *(document.text for document in texts)]
    assert_same_tokens(load_engine(os.environ.get("PIPELIB_TOKENIZER", "gigatoken"), tokenizer), strings)
    theirs = HuggingFaceTokenizer.from_file(str(folder / TOKENIZER))
    theirs.encode_special_tokens = True  # the spelling of a special token is text
    theirs.no_padding()
    theirs.no_truncation()
    for text, encoded in zip(strings, theirs.encode_batch(strings, add_special_tokens=False), strict=True):
        if encoded.ids != tokenizer.encode(text):
            raise UserError(
                f"tokenizers and tiktoken encode {text[:200]!r} differently with this vocabulary, so a model would read other "
                "text elsewhere; use another pre-tokenizer or size, and please report the string."
            )


# ---- Compression -----------------------------------------------------------------------------------------------------


def compare_compression(tokenizer: Tokenizer, documents: list[HeldOut]) -> dict[str, object]:
    """Measure bytes per token on held-out text, for a vocabulary and GPT-2's, for all text and by kind of text."""
    sizes = np.array([len(document.text.encode("utf-8")) for document in documents], np.int64)
    counts = {
        "": np.array([len(tokenizer.encode(document.text)) for document in documents], np.int64),
        "gpt2_": np.array([len(GPT2_TOKENIZER.encode(document.text)) for document in documents], np.int64),
    }
    places: dict[str, list[int]] = defaultdict(list)
    for place, document in enumerate(documents):
        places[document.kind].append(place)
    kinds = {
        kind.replace("=", " "): _compression(sizes[found], {name: each[found] for name, each in counts.items()})
        for kind, found in sorted(places.items())
        if kind and len(found) >= MIN_KIND
    }
    more = {"kinds": kinds} if len(kinds) > 1 else {}
    return {"held_out_bytes": int(sizes.sum()), **_compression(sizes, counts), **more}


Counts = npt.NDArray[np.int64]


def _compression(sizes: Counts, counts: Mapping[str, Counts]) -> dict[str, dict[str, float]]:
    return {f"{name}bytes_per_token": _ratio(sizes, tokens) for name, tokens in counts.items()}


def _ratio(sizes: Counts, tokens: Counts) -> dict[str, float]:
    """Return the ratio of two sums over documents with its 95 % interval (Cochran, Sampling Techniques, 1977, section 6.4)."""
    value = sizes.sum() / max(1, tokens.sum())
    count = len(sizes)
    spread = math.sqrt(((sizes - value * tokens) ** 2).sum() * count / max(1, count - 1)) / max(1, tokens.sum())
    return {"value": round(value, 4), "low": round(value - 1.96 * spread, 4), "high": round(value + 1.96 * spread, 4)}


def _keep_first(documents: Iterable[HeldOut]) -> tuple[list[HeldOut], int]:
    """Return the documents that compression is measured on, and the number of all."""
    kept: list[HeldOut] = []
    size = count = 0
    for document in documents:
        count += 1
        if size < MEASURED_BYTES:
            kept.append(document)
            size += len(document.text)
    return kept, count


def _first(documents: Iterable[HeldOut], most: int) -> Iterator[HeldOut]:
    """Yield the first documents that have about this many bytes of text."""
    size = 0
    for document in documents:
        yield document
        size += len(document.text)
        if size >= most:
            return
