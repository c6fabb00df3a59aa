"""Time the loader: tokens/s of one rank, with rows in training order and in file order.

    make bench-loader                       2 GB of shards, rows of 1,024 tokens, steps of 524,288 tokens
    make bench-loader ARGS="--gigabytes 8"
    make bench-loader ARGS="--shards 5000"  many sparse shards, as under `ulimit -n 256`

Needs numpy only, and free disk space for the shards. "cold": the shards are dropped from the page cache before each run
(posix_fadvise), which "read" proves: the bytes that really came from the disk, for each byte of the rows. For comparison, an
H100 that trains GPT-2 124M at 50 % of its peak takes 579,000 tokens/s.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from pipelib.files import format_bytes
from pipelib.tokens.loader import BatchPlan, Loader, Rows, TokenStream
from pipelib.tokens.shards import HEADER_BYTES, header, shard_name, shard_tokens, write_shard
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

GPU_TOKENS_PER_SECOND = 579_000
LENGTH, MICRO_ROWS, STEP_ROWS = 1024, 64, 512
SHARD_TOKENS = 50_000_000


class FileOrder(BatchPlan):
    """The rows in the order of the files."""

    def rows(self, step: int) -> np.ndarray:
        return np.arange(step * self.rows_per_step, (step + 1) * self.rows_per_step, dtype=np.int64) % self.row_count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the shards in GB; default: 2")
    parser.add_argument(
        "--steps", type=int, default=100, help="steps per run; default: 100, which is 52 million tokens"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs per order and cache; default: 3")
    parser.add_argument(
        "--folder", type=Path, help="where the shards are written; default: the system's temporary folder"
    )
    parser.add_argument(
        "--shards", type=int, help="only read a row of each of so many sparse shards, with few files open"
    )
    arguments = parser.parse_args()
    if arguments.shards:
        many_shards(arguments.shards, arguments.folder)
        return
    with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=arguments.folder) as folder:
        paths = write_random_shards(Path(folder), int(arguments.gigabytes * 5e8))
        total = sum(path.stat().st_size for path in paths)
        print(f"{len(paths)} shards, {format_bytes(total)}; {arguments.steps} steps of {STEP_ROWS} x {LENGTH} tokens")
        for cache in ("warm", "cold"):
            for name, plan in (("permuted", BatchPlan), ("sequential", FileOrder)):
                runs = [measure(paths, plan, cache, arguments.steps, start) for start in starts(arguments, total)]
                rates = [rate for rate, _ in runs]
                median, read = statistics.median(rates), statistics.median(read for _, read in runs)
                print(
                    f"{name:<11}{cache}  {median / 1e6:8.1f} Mtok/s ({min(rates) / 1e6:.1f} to {max(rates) / 1e6:.1f}), "
                    f"{median / GPU_TOKENS_PER_SECOND:.0f} times what one GPU takes; read {read:.1f} bytes a byte",
                    flush=True,
                )


def starts(arguments: argparse.Namespace, total: int) -> list[int]:
    """The first step of each round, so that rounds read different rows."""
    steps = total // 2 // (STEP_ROWS * LENGTH)
    return [round_ * arguments.steps % max(1, steps - arguments.steps) for round_ in range(arguments.rounds)]


def write_random_shards(folder: Path, tokens: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for index, start in enumerate(range(0, tokens, SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - start)
        paths.append(folder / shard_name(index))
        write_shard(paths[-1], count, [rng.integers(0, GPT2_TOKENIZER.size, count, dtype=np.uint16)], GPT2_TOKENIZER)
    return paths


def many_shards(count: int, folder: Path | None) -> None:
    """Read a row from each of many sparse shards while this process may open 256 files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with tempfile.TemporaryDirectory(prefix="bench-loader-", dir=folder) as name:
        shards = {Path(name) / shard_name(index): 100_000_000 for index in range(count)}
        for path, tokens in shards.items():
            path.write_bytes(header(tokens))
            os.truncate(path, HEADER_BYTES + 2 * tokens)
        started = time.perf_counter()
        rows = Rows(TokenStream(shards), LENGTH)
        opened = time.perf_counter()
        rows.batch(np.arange(count, dtype=np.int64) * (len(rows) // count))
        read = time.perf_counter() - opened
    print(f"{count} shards of 100 million tokens: ready in {opened - started:.3f} s, a row of each in {read:.2f} s")


def bytes_read() -> int:
    """Bytes that this process has had read from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines() if Path("/proc/self/io").exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes")), 0)


def measure(paths: list[Path], make_plan: type[BatchPlan], cache: str, steps: int, start: int) -> tuple[float, float]:
    """Tokens per second of a loop that only reads batches, and bytes from the disk for each byte of the rows."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        if cache == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(descriptor, 1 << 24):
                pass
        os.close(descriptor)
    rows = Rows(TokenStream({path: shard_tokens(path) for path in paths}), LENGTH)
    plan = make_plan("0" * 64, 1, len(rows), STEP_ROWS)
    loader = Loader(rows, plan, MICRO_ROWS, 0, 1, tuple)
    began, before = time.perf_counter(), bytes_read()
    seen = 0
    for step in range(start, start + steps):
        seen += sum(inputs.size for inputs, _ in loader.micro_batches(step))
    seconds = time.perf_counter() - began
    return seen / seconds, (bytes_read() - before) / (2 * seen)


if __name__ == "__main__":
    main()
