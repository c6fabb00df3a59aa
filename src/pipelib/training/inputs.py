"""What decides a training, known without a model: where its weights start, and the items that it is scored on."""

from dataclasses import dataclass
from pathlib import Path

from pipelib.errors import UserError
from pipelib.evaluation.benchmark_items import holds_items
from pipelib.files import sha256_file
from pipelib.model.params import InitialisedModelParams
from pipelib.model.weights import MODELS, require_published, weights_sha256
from pipelib.training.params import TrainParams
from pipelib.vocabulary.choice import chosen_tokenizer
from pipelib.vocabulary.tokenizer import Tokenizer

HELLASWAG = "hellaswag.jsonl"
"""The items' file in the folder of benchmarks."""


@dataclass(frozen=True)
class InitialWeights:
    """Weights as all ranks find them."""

    folder: str
    """A Hugging Face folder; empty for random weights, which follow from `train.seed`."""
    sha256: str
    """Of its weights, which decide the result; empty for random weights."""


RANDOM_WEIGHTS = InitialWeights("", "")


def find_initial_weights(model: InitialisedModelParams) -> InitialWeights:
    """The weights that `model.init_from` names, by their hash alone; `require_weights` looks whether they fit.

    Raises:
        UserError: they are not there, or are not those that download verified.
    """
    if model.init_from == "scratch":
        return RANDOM_WEIGHTS
    folder = _folder_of(model)
    try:
        found = weights_sha256(folder)
    except UserError:
        require_weights(model, chosen_tokenizer())  # says more of what is there instead
        raise
    if model.init_is_published:
        require_published(model.init_from, found)
    return InitialWeights(str(folder), found)


def require_weights(model: InitialisedModelParams, tokenizer: Tokenizer) -> str:
    """Refuse weights that are not there or do not have the shape of section `model`; random ones always fit.

    Args:
        tokenizer: whose tokens they have to have.

    Returns:
        What of the folder is not used; empty where everything is.

    Raises:
        UserError: saying what to write there instead.
    """
    if model.init_from == "scratch":
        return ""
    from pipelib.model.huggingface import find_model

    try:
        found = find_model(_folder_of(model), tokenizer)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    if differing := model.difference(found.model.params):
        raise UserError(f"model.init_from: {model.init_from} has {differing}")
    return found.note


def _folder_of(model: InitialisedModelParams) -> Path:
    return MODELS / model.init_from if model.init_is_published else Path(model.init_from)


def require_hellaswag(params: TrainParams, benchmarks: Path) -> dict[str, object]:
    """What `hellaswag_every` adds to what decides a training: the hash of the items; nothing where it is null.

    Raises:
        UserError: there are no items.
    """
    if params.hellaswag_every is None:
        return {}
    items = benchmarks / HELLASWAG
    if not holds_items(items):
        raise UserError(
            f"train.hellaswag_every: {params.hellaswag_every} needs the items of {items}, and there are none; name "
            "hellaswag in download.benchmarks and run dvc repro, or set it to null."
        )
    return {"hellaswag": sha256_file(items)}
