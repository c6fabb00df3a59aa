"""Export shards of tokens to the formats of other programs."""

import os
from pathlib import Path

import numpy as np

from pipelib.errors import UserError
from pipelib.files import format_bytes, require_free_space, write_atomic
from pipelib.inspection.out_folder import make_out
from pipelib.progress import Progress
from pipelib.tokens.shards import open_shard, read_manifest, shard_problems

LONGEST_NAME = 200
"""In bytes. File systems allow 255, and the shard's name and a temporary suffix are added to it."""


def export_npy(tokens: Path, out: Path, name: str) -> None:
    """Write each shard as an array, NAME_val_000000.npy, NAME_train_000001.npy, ..., as build-nanogpt reads them.

    They are uint16, or uint32 if the vocabulary needs it.

    Args:
        tokens: a folder of shards with its manifest; each shard is checked against it first.
        out: a folder that does not exist or is empty.
        name: the prefix of the file names.

    Raises:
        UserError: the name is too long or would mislead those programs, `out` is not empty, a shard is damaged, or the disk is
            too small.
    """
    if any(word in name for word in ("train", "val", "/")):
        raise UserError(
            f"--name {name} has `train`, `val` or a slash in it, so programs that look for a split by its name would "
            "take one for the other; give another name."
        )
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(
            f"--name {name} has more than {LONGEST_NAME} bytes, so the names of the files would be longer than file systems "
            "allow; give a shorter one."
        )
    manifest = read_manifest(tokens)
    make_out(out, empty=True)
    kind = manifest.tokenizer.token_type
    total = kind.itemsize * sum(shard.tokens for shard in manifest.shards)
    require_free_space(out, total, "the export")
    progress = Progress(f"writing {out}", len(manifest.shards), "shards")
    for shard in manifest.shards:
        # before it is written: an array has no checksum that would show the damage
        problems = shard_problems(tokens, shard, manifest.tokenizer)
        if problems:
            raise UserError("\n".join(problems))
        with write_atomic(out / f"{name}_{Path(shard.name).stem}.npy") as file:
            np.save(file, open_shard(tokens / shard.name).astype(kind, copy=False))
        progress.add(1)
    progress.close(f"{len(manifest.shards)} shards, {format_bytes(total)}")
