"""The model that a training starts from: random weights, OpenAI's as download fetched them, or those of a Hugging Face folder."""

from pathlib import Path

from pipelib.model.decoder import Decoder, build
from pipelib.model.huggingface import import_model
from pipelib.model.params import ModelParams
from pipelib.training.inputs import InitialWeights
from pipelib.vocabulary.tokenizer import Tokenizer


def initial_model(params: ModelParams, tokenizer: Tokenizer, seed: int, weights: InitialWeights) -> Decoder:
    """The model before its first step, in fp32 on the CPU; the same for every rank."""
    if weights.folder:
        return import_model(Path(weights.folder), tokenizer, quiet=True).train()
    model = build(params, tokenizer.size)
    model.initialise(seed)
    return model
