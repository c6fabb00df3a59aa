"""The model that a training starts from: random weights, or those of a published model or another Hugging Face folder."""

from pathlib import Path

from pipelib.model.decoder import Decoder, build
from pipelib.model.huggingface import import_model
from pipelib.model.params import ModelParams
from pipelib.training.inputs import InitialWeights
from pipelib.vocabulary.tokenizer import Tokenizer


def initial_model(params: ModelParams, tokenizer: Tokenizer, seed: int, weights: InitialWeights) -> Decoder:
    """Make the model as it is before its first step, in fp32 on the CPU, the same on every rank."""
    if weights.folder:
        return import_model(Path(weights.folder), tokenizer, quiet=True).train()
    model = build(params, tokenizer.size)
    model.initialise(seed)
    return model
