"""What a training starts from: random weights, OpenAI's as download fetched them, or those of a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import UserError, how_to_repair
from pipelib.files import read_json, sha256_file
from pipelib.model.gpt import GPT, initialise
from pipelib.model.huggingface import WEIGHTS, import_model, read_params
from pipelib.model.params import InitialisedModelParams, ModelParams

MODELS = Path("data/models")


@dataclass(frozen=True)
class InitialWeights:
    """Weights as all ranks find them."""

    folder: str
    """A Hugging Face folder; empty for random weights, which follow from `train.seed`."""
    sha256: str
    """Of its weights file, which decides the result; empty for random weights."""


RANDOM_WEIGHTS = InitialWeights("", "")


def find_initial_weights(model: InitialisedModelParams) -> InitialWeights:
    """The weights that `model.init_from` names, looked at but not loaded.

    Raises:
        UserError: they are not there, are not those that download verified, or have another shape than `model`.
    """
    if model.init_from == "scratch":
        return RANDOM_WEIGHTS
    folder = MODELS / model.init_from if model.init_is_published else Path(model.init_from)
    require_weights(model, folder)
    found = sha256_file(folder / WEIGHTS)
    if model.init_is_published and read_json(MODELS / "manifest.json").get(model.init_from, {}).get("sha256") != found:
        raise UserError(
            f"{folder / WEIGHTS} is not the file that {MODELS}/manifest.json names, so its weights cannot be trusted; "
            f"{how_to_repair(str(MODELS))}."
        )
    return InitialWeights(str(folder), found)


def require_weights(model: InitialisedModelParams, folder: Path) -> None:
    """Refuse a folder without weights, or with weights that do not have the shape of section `model`.

    Raises:
        UserError: saying what to write there instead.
    """
    if not (folder / WEIGHTS).is_file():
        remedy = "dvc repro download fetches it" if model.init_is_published else "give a Hugging Face folder"
        raise UserError(
            f"model.init_from: {model.init_from}: {folder / WEIGHTS} is missing, so there are no weights to start from; {remedy}."
        )
    if differing := model.difference(read_params(folder)):
        raise UserError(f"model.init_from: {model.init_from} has {differing}")


def initial_model(params: ModelParams, seed: int, weights: InitialWeights) -> GPT:
    """The model before its first step, in fp32 on the CPU; the same for every rank."""
    if weights.folder:
        return import_model(Path(weights.folder)).train()
    model = GPT(params)
    initialise(model, seed)
    return model
