"""The model that a training starts from: random weights, or those of a published model or another Hugging Face folder."""

from pathlib import Path

import torch

from pipelib.model.decoder import Decoder, build
from pipelib.model.huggingface import import_model
from pipelib.model.params import ModelParams
from pipelib.training.inputs import InitialWeights
from pipelib.vocabulary.tokenizer import Tokenizer


def initial_model(
    params: ModelParams, tokenizer: Tokenizer, seed: int, weights: InitialWeights, *, draw: bool = True
) -> Decoder:
    """Make the model as it is before its first step, in fp32 on the CPU.

    Args:
        draw: draw the random weights. Otherwise they are zero: the other ranks get rank 0's when they are wrapped.
    """
    if weights.folder:
        return import_model(Path(weights.folder), tokenizer, quiet=True).train()
    model = build(params, tokenizer.size)
    if draw:
        model.initialise(seed, zero_projections=weights.zero_projections)
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return model
