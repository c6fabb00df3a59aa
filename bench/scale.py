"""What 15T tokens cost before and between the steps: manifest, loader, permutation, list of units, files of DVC.

    python bench/scale.py                      150,000 sparse shards of 100M tokens, 1.8 million units
    python bench/scale.py --tokens 1e12        another size of the corpus

The shards are sparse files: they have their length and take no space, so reading them says what the loader costs and not what
a disk does. Needs about 2 GB on a file system that knows sparse files.
"""

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipelib.files import format_bytes, write_json
from pipelib.tokens.loader import BatchPlan, permute, training_rows
from pipelib.tokens.shards import Manifest, Shard, header, read_manifest, shard_name, verify_shards, write_shard
from pipelib.tokens.units import UNIT_BYTES, Unit
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

T = TypeVar("T")

SHARD_TOKENS, LENGTH, STEP_ROWS, STEPS = 100_000_000, 1024, 512, 40
BYTES_PER_TOKEN = 4
DVC_FILES = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=15e12, help="tokens of the corpus; default: 15e12")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    arguments = parser.parse_args()
    count = max(2, int(arguments.tokens // SHARD_TOKENS))
    with tempfile.TemporaryDirectory(prefix="bench-scale-", dir=arguments.folder) as name:
        folder = Path(name, "tokens")
        folder.mkdir()
        shards = said(f"make {count:,} sparse shards", lambda: make_shards(folder, count))
        manifest = Manifest(GPT2_TOKENIZER.encoding, {"kind": "sparse"}, shards)
        said("write the manifest", lambda: manifest.write(folder))
        print(f"{'':4}the manifest has {format_bytes((folder / 'manifest.json').stat().st_size)}")
        manifest = said("read the manifest", lambda: read_manifest(folder))
        fingerprint = said("hash the manifest", lambda: manifest.fingerprint)
        rows = said("make the loader", lambda: training_rows(folder, manifest, LENGTH))
        plan = BatchPlan(fingerprint, 1337, len(rows), STEP_ROWS)
        said("read the first batch", lambda: rows.batch(plan.rows(0)))
        late = len(rows) // STEP_ROWS - 1
        seconds = timed(lambda: [rows.batch(plan.rows(late - step)) for step in range(STEPS)])[1]
        speed = STEPS * STEP_ROWS * LENGTH / seconds
        print(f"{'':4}{speed:,.0f} tokens/s in training order, up to step {late:,}, of {len(rows):,} rows")
        seconds = timed(lambda: permute(np.arange(10**6), len(rows), 7))[1]
        print(f"{'':4}{1e6 / seconds:,.0f} rows/s of the permutation")
        record = Path(name, "verified.json")
        note_as_verified(folder, manifest, record)
        said("check shards that were read before", lambda: verify_shards(folder, manifest, record))
        real = Path(name, "real")
        few = Manifest(manifest.encoding, {}, tuple(real_shard(real, number) for number in range(4)))
        seconds = timed(lambda: verify_shards(real, few))[1]
        print(f"{'':4}{few.tokens('train') * 2 / seconds / 1e9:.2f} GB/s to check shards that have to be read")
        units = int(arguments.tokens * BYTES_PER_TOKEN // UNIT_BYTES)
        said(f"list a tenth of {units:,} units", lambda: [unit(number) for number in range(units // 10)])
        dvc_files(Path(name, "dvc"), count)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def said(what: str, call: Callable[[], T]) -> T:
    """What a call returns; its seconds and the memory so far are printed."""
    found, seconds = timed(call)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{what:<44}{seconds:>9.2f} s, at most {format_bytes(memory)} so far", flush=True)
    return found


def make_shards(folder: Path, count: int) -> tuple[Shard, ...]:
    """Files with the header and the length of shards."""
    start = header(SHARD_TOKENS)
    for number in range(count):
        with (folder / shard_name(number)).open("wb") as file:
            file.write(start)
            file.truncate(len(start) + 2 * SHARD_TOKENS)
    return tuple(
        Shard(shard_name(number), "train" if number else "val", SHARD_TOKENS, 100_000, f"{number:064x}")
        for number in range(count)
    )


def real_shard(folder: Path, number: int) -> Shard:
    """A shard of random tokens, so that there is something to read."""
    tokens = np.random.default_rng(number).integers(0, GPT2_TOKENIZER.size, SHARD_TOKENS, dtype=np.uint16)
    return write_shard(folder / shard_name(number + 1), SHARD_TOKENS, [tokens], GPT2_TOKENIZER)[0]


def note_as_verified(folder: Path, manifest: Manifest, record: Path) -> None:
    """Write the record of a check that found every shard right."""
    stats = {shard.name: (folder / shard.name).stat() for shard in manifest.shards}
    files = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()}
    write_json(record, {"manifest": manifest.fingerprint, "files": files})


def unit(number: int) -> Unit:
    return Unit(Path(f"data/raw/{number // 60:06d}.parquet"), f"{number:064x}", number, number + 30, 30_000, UNIT_BYTES)


def dvc_files(folder: Path, count: int) -> None:
    """Have DVC take so many small files, and say what `count` would take."""
    (folder / "data").mkdir(parents=True)
    for number in range(DVC_FILES):
        (folder / "data" / shard_name(number)).write_bytes(number.to_bytes(8, "big"))
    dvc = shutil.which("dvc", path=str(Path(sys.executable).parent)) or "dvc"
    for command in (["git", "init", "--quiet"], [dvc, "init", "--quiet"]):
        subprocess.run(command, cwd=folder, check=True)
    for what, command in (("add", [dvc, "add", "--quiet", "data"]), ("status", [dvc, "status", "--quiet"])):
        seconds = timed(lambda command=command: subprocess.run(command, cwd=folder, check=True))[1]  # type: ignore[misc]
        print(
            f"dvc {what} of {DVC_FILES:,} files of 8 bytes: {seconds:.1f} s, {seconds / DVC_FILES * count:,.0f} s for {count:,}"
        )


if __name__ == "__main__":
    main()
