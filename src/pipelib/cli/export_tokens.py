"""`pipelib export-tokens`: write the shards for programs that read another format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelib.cli.command import Command, option
from pipelib.workspace.places import HERE

EXAMPLES = """examples:
  pipelib export-tokens --format npy --out edu_fineweb10B
  pipelib export-tokens --format npy --out ../short --tokens ../other-clone/data/tokens --name text

npy: NAME_val_000000.npy, NAME_train_000001.npy, ...: one array per shard, which build-nanogpt's
loader finds by these names. llm.c and modded-nanogpt read the shards in data/tokens as they are.
"""


@dataclass(frozen=True)
class ExportTokens(Command):
    """Write the shards in another format."""

    command = "export-tokens"
    help = "write the shards in another program's format"
    description = "Check each shard of a folder against the manifest, and write it in another format."
    examples = EXAMPLES

    tokens: Path = option("folder of shards; default: data/tokens", default=HERE.tokens, metavar="DIR")
    format: Literal["npy"] = option("npy: NumPy arrays")
    out: Path = option("folder to write to, new or empty", metavar="DIR")
    name: str = option("prefix of the file names; default: edufineweb", default="edufineweb")

    def run(self) -> int:
        """Export; progress lines say what was written."""
        from pipelib.inspection.export import export_npy

        export_npy(self.tokens, self.out, self.name)
        return 0
