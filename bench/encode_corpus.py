"""Time tokenization, from parquet to finished and hashed shards, against a plain loop in the same run.

    make bench-tokenize                                 300 MB of English, both engines, 1 and 2 workers
    make bench-tokenize ARGS="--megabytes 1000 --rounds 3"

The text is the docstrings of the installed packages: once as they are ("first", distinct text), then repeated in other
orders ("repeats"). The plain loop is build-nanogpt's: tiktoken in `Pool.imap`, one document at a time, into the buffer of a
shard that is saved when full. Unlike there, the text is in memory before the clock starts.

"in all" is the wall-clock time of the whole run, with the start of its processes. "after start" is the same without the start
of the workers, per worker. "at work" counts only the time in which workers work: on all text, on its first pass, and on the
repeats.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.corpus.parquet import iterate_raw, write_raw
from pipelib.corpus.raw import Document, write_manifest
from pipelib.corpus.sources.docs import DocsSource
from pipelib.files import format_bytes
from pipelib.stage import Build
from pipelib.tokens.encode_corpus import encode_corpus
from pipelib.tokens.params import TokenizeParams
from pipelib.tokens.workers import Workers, worker_engine
from pipelib.tracking.run import NullRun
from pipelib.vocabulary.choice import Vocabulary
from pipelib.vocabulary.engines import Texts, load_engine
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SHARD_TOKENS = 10_000_000
WAIT = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of the text in MB; default: 300")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turn; default: 3")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers; default: 1 2")
    parser.add_argument("--engines", nargs="+", default=["gigatoken", "tiktoken"], help="default: both")
    parser.add_argument("--only", nargs=3, metavar=("WHAT", "WORKERS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        what, workers, folder = arguments.only
        measure = measure_plain if what == "plain" else measure_ours
        print(json.dumps(measure(what, int(workers), Path(folder))))
        return
    with tempfile.TemporaryDirectory(prefix="bench-tokenize-") as folder:
        os.environ["PIPELIB_STATE_DIR"] = str(Path(folder) / "state")
        text_bytes = write_corpus(Path(folder), arguments.megabytes * 1_000_000)
        print(f"{text_bytes / 1e6:,.0f} MB of text; medians and ranges of {arguments.rounds} runs in turn\n")
        kinds = [(engine, workers) for engine in arguments.engines for workers in arguments.workers]
        kinds.append(("plain", max(arguments.workers)))
        runs: dict[tuple[str, int], list[dict]] = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):
            for (what, workers), found in runs.items():
                command = [sys.executable, __file__, "--only", what, str(workers), folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                found.append(json.loads(done.stdout))
        report(runs, text_bytes)


def write_corpus(folder: Path, max_bytes: int) -> int:
    """Write `first/`, the docstrings once, and `raw/`, the same file and larger ones that repeat it in other orders."""
    first = DocsSource(0).write(folder / "first", folder)
    write_manifest(folder / "first", {"kind": "bench"}, first)
    documents = [Document(row["text"]) for row in iterate_raw(folder / "first")]
    draw = random.Random(0)

    def repeated() -> Iterator[Document]:
        left = max_bytes - first.counts["text_bytes"]
        while left > 0:
            draw.shuffle(documents)
            for document in documents:
                left -= len(document.text.encode("utf-8"))
                yield document

    repeats = write_raw(repeated(), folder / "raw")
    files = list(first.files)
    for file in repeats.files:
        files.append(replace(file, name=f"repeated_{file.name}"))
        (folder / "raw" / file.name).rename(folder / "raw" / files[-1].name)
    for file in first.files:
        os.link(folder / "first" / file.name, folder / "raw" / file.name)
    write_manifest(folder / "raw", {"kind": "bench"}, replace(repeats, files=tuple(files)))
    return first.counts["text_bytes"] + repeats.counts["text_bytes"]


def measure_ours(engine: str, workers: int, folder: Path) -> dict:
    """Run the stage with a fresh state: the first pass alone, then everything."""
    os.environ.update(PIPELIB_WORKERS=str(workers), PIPELIB_TOKENIZER=engine)
    result = {}
    for name in ("first", "raw"):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            os.environ["PIPELIB_STATE_DIR"] = place
            build = Build(Path(place) / "outs", Path(place) / "work", NullRun(), {}, False)
            began = time.perf_counter()
            counts, speed = encode_corpus(
                build,
                folder / name,
                TokenizeParams(SHARD_TOKENS if name == "raw" else 1_000_000, "none"),
                0,
                Vocabulary(GPT2_TOKENIZER, None),
            )
            result[name] = {"tokens": counts["tokens"], "seconds": time.perf_counter() - began, **speed}
    result["start"] = start_seconds(workers)
    result["encode_only"] = encode_only(engine, folder)
    return result


def start_seconds(count: int) -> float:
    """Seconds until all workers have started and loaded their tokenizers."""
    began = time.perf_counter()
    with Workers(count, GPT2_TOKENIZER) as workers:
        workers.each("start", load_and_wait, range(count), WAIT)
        return time.perf_counter() - began - WAIT


def load_and_wait(_: int, wait: float) -> None:
    """Load the tokenizer, then wait, so that each worker gets exactly one task."""
    worker_engine()
    time.sleep(wait)


def encode_only(engine: str, folder: Path) -> float:
    """Tokens per second of the engine alone, in one process, on Python strings in memory that it has not seen before."""
    texts = [row["text"] for row in iterate_raw(folder / "first")]
    if engine == "tiktoken":
        encoding = GPT2_TOKENIZER
        began = time.perf_counter()
        tokens = sum(len(encoding.encode(text)) for text in texts)
    else:
        loaded = load_engine(engine, GPT2_TOKENIZER)
        together = Texts.of(texts)
        began = time.perf_counter()
        tokens = len(loaded.encode(together)[0])
    return tokens / (time.perf_counter() - began)


def measure_plain(_: str, workers: int, folder: Path) -> dict:
    """Run the plain loop and time all of it."""
    texts = [row["text"] for row in iterate_raw(folder / "raw")]
    began = time.perf_counter()
    total = count = shards = 0
    buffer = np.empty(SHARD_TOKENS, np.uint16)
    with tempfile.TemporaryDirectory(dir=folder) as out, multiprocessing.get_context("fork").Pool(workers) as pool:
        for tokens in pool.imap(tokenize_plainly, texts, chunksize=16):
            total += len(tokens)
            while len(tokens):
                taken = min(len(tokens), SHARD_TOKENS - count)
                buffer[count : count + taken] = tokens[:taken]
                tokens, count = tokens[taken:], count + taken
                if count == SHARD_TOKENS:
                    np.save(Path(out) / f"{shards:06d}.npy", buffer)
                    shards, count = shards + 1, 0
        np.save(Path(out) / f"{shards:06d}.npy", buffer[:count])
        return {"raw": {"tokens": total, "seconds": time.perf_counter() - began}}


def tokenize_plainly(text: str) -> np.ndarray:
    tokens = [50256]
    tokens.extend(GPT2_TOKENIZER.encode(text))
    return np.array(tokens).astype(np.uint16)


def report(runs: dict[tuple[str, int], list[dict]], text_bytes: int) -> None:
    rates = {
        kind: [run["raw"]["tokens"] / run["raw"]["seconds"] / 1e6 for run in found] for kind, found in runs.items()
    }
    plain = next(kind for kind in runs if kind[0] == "plain")
    print(
        "engine     workers  Mtok/s in all         MB/s   "
        "per core: after start   at work: all   first repeats  peak memory  times plain"
    )
    for kind, found in runs.items():
        line = f"{kind[0]:<11}{kind[1]:<9}{span(rates[kind]):<20}{text_bytes / 1e6 / seconds(found):6.0f}"
        if kind != plain:
            every, first, repeats = (
                statistics.median(per_core(run, part) for run in found) for part in ("raw", "first", "repeats")
            )
            peak = max(run["raw"]["worker_peak_bytes"] for run in found)
            ratio = statistics.median(rates[kind]) / statistics.median(rates[plain])
            started = statistics.median(
                run["raw"]["tokens"] / (run["raw"]["seconds"] - run["start"]) / kind[1] / 1e6 for run in found
            )
            line += (
                f"   {started:21.1f} {every:14.1f} {first:7.1f} {repeats:7.1f}  {format_bytes(peak):>11}  {ratio:.1f}"
            )
        print(line)
    print()
    for kind, found in runs.items():
        if kind == plain:
            continue
        steps = {
            step: statistics.median(run["raw"]["worker_seconds"][step] for run in found)
            for step in found[0]["raw"]["worker_seconds"]
        }
        total = sum(steps.values())
        shares = ", ".join(f"{step} {spent / total:.0%}" for step, spent in steps.items())
        alone = statistics.median(run["encode_only"] for run in found) / 1e6
        print(f"{kind[0]}, {kind[1]} workers: {shares}; the engine alone, first pass, 1 process: {alone:.1f} Mtok/s")


def seconds(found: list[dict]) -> float:
    return statistics.median(run["raw"]["seconds"] for run in found)


def per_core(run: dict, part: str) -> float:
    """Mtok per second of the workers' work: on everything, on the first pass, or on all but the first pass."""
    spent = {name: (run[name]["tokens"], sum(run[name]["worker_seconds"].values())) for name in ("raw", "first")}
    tokens, work = spent["first" if part == "first" else "raw"]
    if part == "repeats":
        tokens, work = tokens - spent["first"][0], work - spent["first"][1]
    return tokens / work / 1e6


def span(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
