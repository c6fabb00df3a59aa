"""`pipelib export-tokens`: the shards for programs that read another format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelib.cli.command import Command, option
from pipelib.workspace.places import HERE

EXAMPLES = """examples:
  pipelib export-tokens --format npy --out edu_fineweb10B
  pipelib export-tokens --format npy --out ../short --tokens ../other-clone/data/tokens --name text

npy: NAME_val_000000.npy, NAME_train_000001.npy, ...: a uint16 array for each shard, as build-nanogpt's
loader finds and reads them. The shards in data/tokens are in the format of llm.c and modded-nanogpt,
which read them as they are.
"""


@dataclass(frozen=True)
class ExportTokens(Command):
    """Write the shards in another format."""

    command = "export-tokens"
    help = "write the shards in another program's format"
    description = "Write every shard of a folder in another format, checked against its manifest on the way."
    examples = EXAMPLES

    tokens: Path = option("default: data/tokens", default=HERE.tokens, metavar="DIR")
    format: Literal["npy"] = option("npy: NumPy arrays")
    out: Path = option("where to; a new or an empty folder", metavar="DIR")
    name: str = option("what the files' names begin with; default: edufineweb", default="edufineweb")

    def run(self) -> int:
        """Export; the progress says what was written."""
        from pipelib.inspection.export import export_npy

        export_npy(self.tokens, self.out, self.name)
        return 0
