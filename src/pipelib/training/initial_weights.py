"""What a training starts from: random weights, OpenAI's as download fetched them, or those of a Hugging Face folder."""

import sys
from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import UserError
from pipelib.model.gpt import GPT, initialise
from pipelib.model.huggingface import find_model, import_model
from pipelib.model.params import InitialisedModelParams, ModelParams
from pipelib.model.weights import MODELS, require_published, weights_sha256


@dataclass(frozen=True)
class InitialWeights:
    """Weights as all ranks find them."""

    folder: str
    """A Hugging Face folder; empty for random weights, which follow from `train.seed`."""
    sha256: str
    """Of its weights, which decide the result; empty for random weights."""


RANDOM_WEIGHTS = InitialWeights("", "")


def find_initial_weights(model: InitialisedModelParams) -> InitialWeights:
    """The weights that `model.init_from` names, looked at but not loaded.

    Raises:
        UserError: they are not there, are not those that download verified, or have another shape than `model`.
    """
    if model.init_from == "scratch":
        return RANDOM_WEIGHTS
    if note := require_weights(model):
        print(f"train: {note}", file=sys.stderr, flush=True)
    folder = _folder_of(model)
    found = weights_sha256(folder)
    if model.init_is_published:
        require_published(model.init_from, found)
    return InitialWeights(str(folder), found)


def require_weights(model: InitialisedModelParams) -> str:
    """Refuse a folder without weights, or with weights that do not have the shape of section `model`.

    Returns:
        What of the folder is not used; empty where everything is.

    Raises:
        UserError: saying what to write there instead.
    """
    try:
        found = find_model(_folder_of(model))
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    if differing := model.difference(found.model.params):
        raise UserError(f"model.init_from: {model.init_from} has {differing}")
    return found.note


def _folder_of(model: InitialisedModelParams) -> Path:
    return MODELS / model.init_from if model.init_is_published else Path(model.init_from)


def initial_model(params: ModelParams, seed: int, weights: InitialWeights) -> GPT:
    """The model before its first step, in fp32 on the CPU; the same for every rank."""
    if weights.folder:
        return import_model(Path(weights.folder), quiet=True).train()
    model = GPT(params)
    initialise(model, seed)
    return model
