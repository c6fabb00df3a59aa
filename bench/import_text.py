"""Time the import of the user's own files, and count its requests: one large file of each kind, many small files.

    make bench-import                                        300 MB of English of each kind, and 10,000 files of 1 KB
    make bench-import ARGS="--kinds jsonl csv"               these kinds only; "shuffled" is jsonl in another order
    make bench-import ARGS="--kinds jsonl --against ../other-checkout"     also the code of another checkout, in turn

The text is the docstrings of the installed packages, repeated in other orders. Each run is a fresh process. Its clock starts
after the imports and covers the work of the stage: hash the files, read them, write data/raw. "memory" is the most of any of its
processes ($PIPELIB_WORKERS, default one per core). "requests" counts the connections of the process to its proxy, which answers
none of them.
"""

import argparse
import gzip
import json
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
KINDS = ("jsonl", "shuffled", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "saved", "txt", "small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300, help="size of each large file in MB; default: 300")
    parser.add_argument("--files", type=int, default=10_000, help="number of small files; default: 10000")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, in turn; default: 3")
    parser.add_argument("--against", metavar="CHECKOUT", help="also time the code of this checkout")
    parser.add_argument("--only", nargs=2, metavar=("SOURCE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*map(Path, arguments.only))))
        return
    checkouts = [HERE, *([Path(arguments.against).resolve()] if arguments.against else [])]
    with tempfile.TemporaryDirectory(prefix="bench-import-") as folder, counting_proxy() as (proxy, requests):
        sizes = write_files(Path(folder), arguments.megabytes * 1_000_000, arguments.files, arguments.kinds)
        print(f"{'':<24}{'seconds':>18}{'MB/s':>8}{'memory':>10}{'requests':>10}")
        for kind, size in sizes.items():
            runs: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
            for _ in range(arguments.rounds):
                for checkout, found in runs.items():
                    found.append(run(checkout / "src", Path(folder) / kind, proxy, requests))
            for checkout, found in runs.items():
                report(f"{kind}, {'here' if checkout == HERE else 'there'}", size, found)


def run(source: Path, folder: Path, proxy: str, requests: list[int]) -> dict[str, float]:
    """Run one import in a fresh process."""
    before = len(requests)
    environment = {**os.environ, **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)}
    command = [sys.executable, __file__, "--only", str(source), str(folder)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    return {**json.loads(done.stdout.splitlines()[-1]), "requests": len(requests) - before}


def measure(source: Path, folder: Path) -> dict[str, float]:
    """Import the files of a folder as the download stage does, with the code of a checkout."""
    sys.path.insert(0, str(source))
    from pipelib.corpus.sources.local import LocalSource
    from pipelib.processes import peak_memory

    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        started = time.perf_counter()
        if folder.name == "shuffled":
            from pipelib.corpus.options import Options

            local = LocalSource(folder, "**/*", options=Options(shuffle_seed=1))
        else:
            local = LocalSource(folder, "**/*")
        local.identity()
        local.write(Path(out) / "raw", Path(out) / "work")
        seconds = time.perf_counter() - started
        largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {"seconds": seconds, "memory": max(peak_memory(), largest_worker)}


def report(name: str, size: int, runs: list[dict[str, float]]) -> None:
    """Print a line of medians, with the range of the seconds."""
    seconds = [found["seconds"] for found in runs]
    middle = statistics.median(seconds)
    spread = f"{middle:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
    memory = max(found["memory"] for found in runs) / 1e6
    requests = max(found["requests"] for found in runs)
    print(f"{name:<24}{spread:>18}{size / 1e6 / middle:>8.0f}{memory:>7.0f} MB{requests:>10.0f}", flush=True)


def write_files(folder: Path, max_bytes: int, small_files: int, kinds: list[str]) -> dict[str, int]:
    """Write a folder of each kind; return the bytes of text in each."""
    sys.path.insert(0, str(HERE / "src"))
    from pipelib.corpus.parquet import iterate_raw
    from pipelib.corpus.raw import write_manifest
    from pipelib.corpus.sources.docs import DocsSource

    docs = folder / "docs"
    write_manifest(docs, {"kind": "bench"}, DocsSource(0).write(docs, folder))
    texts = [row["text"] for row in iterate_raw(docs)]
    shutil.rmtree(docs)
    sizes = {}
    for kind in kinds:
        (folder / kind).mkdir()
        if kind == "small":
            for number in range(small_files):
                (folder / f"small/{number:05}.txt").write_text(texts[number % len(texts)][:1000])
            sizes[kind] = sum(path.stat().st_size for path in (folder / kind).iterdir())
        else:
            write_kind(kind, folder / kind, repeated(texts, max_bytes))
            sizes[kind] = max_bytes
    return sizes


def write_kind(kind: str, folder: Path, texts: Iterator[str]) -> None:
    """Write one file of a kind, as the tools that people use do."""
    import pandas as pd
    import pyarrow as pa

    rows = (
        {"text": text, "id": str(number), "score": 3.5, "token_count": len(text) // 4}
        for number, text in enumerate(texts)
    )
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    match kind:
        case "txt":
            with (folder / "a.txt").open("w") as file:
                file.writelines(f"{row['text']}\n\n" for row in rows)
        case "jsonl" | "shuffled":
            with (folder / "a.jsonl").open("w") as file:
                file.writelines(lines)
        case "jsonl.gz":
            with gzip.open(folder / "a.jsonl.gz", "wt") as file:
                file.writelines(lines)
        case "jsonl.zst":
            with pa.output_stream(str(folder / "a.jsonl.zst"), compression="zstd") as file:
                for line in lines:
                    file.write(line.encode())
        case "json":
            pd.DataFrame(rows).to_json(folder / "a.json", orient="records", force_ascii=False)
        case "csv":
            pd.DataFrame(rows).to_csv(folder / "a.csv", index=False)
        case "parquet":
            pd.DataFrame(rows).to_parquet(folder / "a.parquet")
        case "saved":
            import datasets

            datasets.Dataset.from_pandas(pd.DataFrame(rows)).save_to_disk(str(folder / "saved"))


def repeated(texts: list[str], max_bytes: int) -> Iterator[str]:
    """Yield the texts in one random order after the other, until there are enough bytes."""
    draw = random.Random(0)
    size = 0
    while True:
        for text in draw.sample(texts, len(texts)):
            size += len(text.encode())
            if size > max_bytes:
                return
            yield text


@contextmanager
def counting_proxy() -> Iterator[tuple[str, list[int]]]:
    """Run a proxy that closes every connection; yields its URL and a list that gets an entry per connection."""
    requests: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                requests.append(1)
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests


if __name__ == "__main__":
    main()
