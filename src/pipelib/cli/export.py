"""`pipelib export`: write a model for other engines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelib.cli.command import Command, option
from pipelib.workspace.places import HERE

EXAMPLES = """examples:
  pipelib export --out model.gguf
  pipelib export --type q8_0 --out model-q8.gguf --model ../other-clone/models

models/ itself is a Hugging Face folder, which transformers loads as it is.
"""


@dataclass(frozen=True)
class Export(Command):
    """Write a model as GGUF."""

    command = "export"
    help = "write a model for llama.cpp, Ollama and others"
    description = "Write a model, with its vocabulary, as one GGUF file, and print the file's SHA-256."
    examples = EXAMPLES

    model: Path = option("the model, a Hugging Face folder; default: models", default=HERE.model, metavar="DIR")
    format: Literal["gguf"] = option("gguf: the file of llama.cpp; default: gguf", default="gguf")
    type: Literal["f32", "f16", "q8_0"] = option("type of the matrices; default: f16", default="f16")
    out: Path = option("file to write", metavar="FILE")

    def run(self) -> int:
        """Export; a line says what was written."""
        from pipelib.inspection.gguf_file import export_gguf
        from pipelib.vocabulary.choice import chosen_tokenizer

        export_gguf(self.model, self.out, self.type, chosen_tokenizer())
        return 0
