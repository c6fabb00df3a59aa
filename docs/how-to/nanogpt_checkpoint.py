"""Make a Hugging Face folder, which `model.init_from` takes, of a checkpoint of nanoGPT or build-nanogpt.

    python docs/how-to/nanogpt_checkpoint.py out/ckpt.pt ./mine

Both keep their matrices as our model does, so names are all that changes. Nothing in the checkpoint is executed.
"""

import argparse
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelib.errors import UserError
from pipelib.model.families.gpt2 import GPT2
from pipelib.model.huggingface import export_model
from pipelib.model.shapes.gpt2 import GPT2Params
from pipelib.schema import parse
from pipelib.vocabulary.gpt2 import GPT2_TOKENIZER

SHAPE = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "context_length": "block_size"}


class GPTConfig:
    """What an object of build-nanogpt's class of this name becomes when its checkpoint is read."""


def main() -> None:
    """Read the checkpoint and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="ckpt.pt of nanoGPT, or model_NNNNN.pt of build-nanogpt")
    parser.add_argument("folder", type=Path, help="where the model goes")
    arguments = parser.parse_args()
    try:
        for line in convert(arguments.checkpoint, arguments.folder):
            print(line)
    except UserError as problem:
        sys.exit(str(problem))


def convert(path: Path, folder: Path) -> list[str]:
    """Write the model of a checkpoint into a folder, and say what it is.

    Raises:
        UserError: it is not a checkpoint of these two, or not of a GPT-2.
    """
    content = read_checkpoint(path)
    is_nanogpt = isinstance(content.get("model_args"), dict)
    sizes = content["model_args"] if is_nanogpt else vars(content.get("config", GPTConfig()))
    problems: list[str] = []
    params = parse(
        GPT2Params,
        {"architecture": "gpt2", **{ours: sizes.get(theirs) for ours, theirs in SHAPE.items()}},
        "",
        problems,
    )
    if params is None or sizes.get("vocab_size") not in (GPT2_TOKENIZER.size, GPT2_TOKENIZER.padded_size):
        problems.append(f"vocab_size: {sizes.get('vocab_size')}; GPT-2's is {GPT2_TOKENIZER.size}.")
        raise UserError(f"{path} is not a checkpoint of a GPT-2, so it was not converted: {' '.join(problems)}")
    model = GPT2(params, GPT2_TOKENIZER.size)
    model.load_state_dict(our_tensors(path, content.get("model"), model.state_dict()))
    export_model(model, GPT2_TOKENIZER, folder, {"converted_from": path.name})
    shape = ", ".join(f"{name}: {value}" for name, value in vars(params).items())
    gelu = "nanoGPT's GELU is exact and GPT-2's an approximation, so the logits differ a little from nanoGPT's"
    return [
        f"{folder} has the model of {path}; section model: {{{shape}, init_from: {folder}}}",
        *([gelu] * is_nanogpt),
    ]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What torch.save wrote.

    Raises:
        UserError: it cannot be read without executing something.
    """
    names = [(GPTConfig, f"{module}.GPTConfig") for module in ("__main__", "train_gpt2", "model")]
    try:
        with torch.serialization.safe_globals(names):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read ({str(error).splitlines()[0]}); copy it again."
        ) from None
    return content if isinstance(content, dict) else {}


def our_tensors(path: Path, found: object, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by our names; biases that a model does without are zero, and so is the vocabulary's padding.

    Args:
        ours: tensors of the shapes that are wanted.

    Raises:
        UserError: others are there.
    """
    theirs = found if isinstance(found, dict) else {}
    tensors = {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    tensors = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(".attn.bias")}  # masks
    embedding = tensors.get("wte.weight", torch.empty(0))
    if not torch.equal(tensors.pop("lm_head.weight", embedding), embedding):
        raise UserError(f"{path} has an lm_head.weight of its own, which GPT-2 does not have, so it was not converted.")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    if embedding.ndim == 2:
        tensors["wte.weight"] = F.pad(
            embedding[: GPT2_TOKENIZER.size], (0, 0, 0, GPT2_TOKENIZER.padded_size - GPT2_TOKENIZER.size)
        )
    tensors = {name: tensor for name, tensor in zeros.items() if name.endswith(".bias")} | tensors
    differing = {name for name in ours.keys() | tensors.keys() if shape_of(tensors, name) != shape_of(ours, name)}
    if differing:
        raise UserError(
            f"{path} has other tensors than a GPT-2 of its sizes ({', '.join(sorted(differing)[:3])}), so it was not converted."
        )
    return tensors


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """The shape of a tensor, if it is there."""
    return tuple(tensors[name].shape) if name in tensors else None


if __name__ == "__main__":
    main()
