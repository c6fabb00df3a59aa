"""The inputs of a training that can be found without a model: its initial weights, and the items that it is scored on."""

from dataclasses import dataclass
from pathlib import Path

from pipelib.corpus.published_models import folder_name
from pipelib.errors import UserError
from pipelib.evaluation.benchmark_items import holds_items
from pipelib.files import sha256_file
from pipelib.model.params import RANDOM, ZERO_PROJECTIONS, InitialisedModelParams
from pipelib.model.weights import MODELS, require_published, weights_sha256
from pipelib.training.params import TrainParams
from pipelib.vocabulary.choice import chosen_tokenizer
from pipelib.vocabulary.tokenizer import Tokenizer

HELLASWAG = "hellaswag.jsonl"
"""The file of HellaSwag's items in the folder of benchmarks."""


@dataclass(frozen=True)
class InitialWeights:
    """The weights that all ranks start from."""

    folder: str
    """A Hugging Face folder; empty for random weights, which follow from `train.seed`."""
    sha256: str
    """The hash of the weights, which decide the result; empty for random weights."""
    zero_projections: bool = False
    """Random weights, but zero where blocks and an untied output layer write."""


RANDOM_WEIGHTS = InitialWeights("", "")


def find_initial_weights(model: InitialisedModelParams) -> InitialWeights:
    """Find the weights that `model.init_from` names and hash them. `require_weights` checks whether they fit.

    Raises:
        UserError: they are missing, or are not those that download verified.
    """
    if model.init_from in RANDOM:
        return InitialWeights("", "", zero_projections=model.init_from == ZERO_PROJECTIONS)
    folder = _folder_of(model)
    try:
        found = weights_sha256(folder)
    except UserError:
        require_weights(model, chosen_tokenizer())  # its message says more about what is in the folder
        raise
    if model.init_is_published:
        require_published(model.init_from, found)
    return InitialWeights(str(folder), found)


def require_weights(model: InitialisedModelParams, tokenizer: Tokenizer) -> str:
    """Refuse weights that are missing or do not have the shape of section `model`. Random weights always fit.

    Args:
        tokenizer: the one whose tokens the model must have.

    Returns:
        A note about the part of the folder that is not used; empty if all of it is.

    Raises:
        UserError: with what to write in section `model` instead.
    """
    if model.init_from in RANDOM:
        return ""
    from pipelib.model.huggingface import find_model  # here, since it imports torch

    try:
        found = find_model(_folder_of(model), tokenizer)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from None
    if differing := model.difference(found.model.params):
        raise UserError(f"model.init_from: {model.init_from} has {differing}")
    return found.note


def _folder_of(model: InitialisedModelParams) -> Path:
    return MODELS / folder_name(model.init_from) if model.init_is_published else Path(model.init_from)


def require_hellaswag(params: TrainParams, benchmarks: Path) -> dict[str, object]:
    """Find the input that `hellaswag_every` adds: the hash of the items; empty if it is null.

    Raises:
        UserError: the items are missing.
    """
    if params.hellaswag_every is None:
        return {}
    items = benchmarks / HELLASWAG
    if not holds_items(items):
        raise UserError(
            f"train.hellaswag_every: {params.hellaswag_every} needs the items in {items}, and there are none; name "
            "hellaswag in download.benchmarks and run dvc repro, or set it to null."
        )
    return {"hellaswag": sha256_file(items)}
