"""`pipelib export-tokens`: the shards for programs that read another format."""

import argparse
from pathlib import Path
from typing import Any

from pipelib.errors import UserError
from pipelib.workspace.places import HERE

EXAMPLES = """examples:
  pipelib export-tokens --format npy --out edu_fineweb10B

npy: NAME_val_000000.npy, NAME_train_000001.npy, ...: uint16 arrays, one a shard, as build-nanogpt's loader finds and reads
them. The shards in data/tokens themselves are llm.c's and modded-nanogpt's format; those programs read them as they are.
"""


def add_parser(subparsers: Any) -> None:
    """Add `export-tokens` to the command."""
    parser = subparsers.add_parser(
        "export-tokens",
        help="write the shards in another program's format",
        description="Write every shard of a folder in another format, checked against its manifest on the way.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=Path, default=HERE.tokens, metavar="DIR", help="default: data/tokens")
    parser.add_argument("--format", choices=("npy",), required=True, help="npy: NumPy arrays")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to; a new or an empty folder")
    parser.add_argument("--name", default="edufineweb", help="what the files' names begin with; default: edufineweb")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, and say what was written."""
    import numpy as np

    from pipelib.files import format_bytes, require_free_space, write_atomic
    from pipelib.progress import Progress
    from pipelib.tokens.shards import open_shard, read_manifest, shard_problems

    if any(word in arguments.name for word in ("train", "val", "/")):
        raise UserError(
            f"--name {arguments.name} has `train`, `val` or a slash in it, so programs that look for a split by its name would "
            "take one for the other; give another name."
        )
    manifest = read_manifest(arguments.tokens)
    out: Path = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} is there and not empty, so its files could be mixed up with these; name another folder."
        )
    total = 2 * sum(shard.tokens for shard in manifest.shards)
    require_free_space(out, total, "the export")
    progress = Progress(f"writing {out}", len(manifest.shards), "shards")
    for shard in manifest.shards:
        problems = shard_problems(arguments.tokens, shard, manifest.tokenizer)
        if problems:
            raise UserError("\n".join(problems))
        with write_atomic(out / f"{arguments.name}_{Path(shard.name).stem}.npy") as file:
            np.save(file, open_shard(arguments.tokens / shard.name).astype(np.uint16, copy=False))
        progress.add(1)
    progress.close(f"{len(manifest.shards)} shards, {format_bytes(total)}")
    return 0
