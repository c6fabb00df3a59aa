"""Models as the evaluation sees them: ours, and the baselines that it is compared with. Each is measured once, by the same code.

Results are kept in `STATE/baselines/KEY/`, where KEY is a hash of the weights, the data, the parameters and the code that
measures. So other experiments and other models of ours find them there, even without the baseline's weights.

    lock          held while the baseline is measured
    result.json   the result, and the SHA-256 of items.npz; written last
    items.npz     the scores of every item
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelib.corpus.published_models import WEIGHTS, folder_name, is_hub_model, is_model_folder
from pipelib.errors import UserError, tell
from pipelib.evaluation.items import Measured, read_items_file, write_items
from pipelib.files import read_json, sha256_file, sha256_json, write_json
from pipelib.model.params import ModelParams, published_params
from pipelib.model.weights import CONFIG, MODELS, is_file, published_sha256, require_published, weights_sha256
from pipelib.vocabulary.choice import published_tokenizer, tokenizer_of_model
from pipelib.vocabulary.tokenizer import Tokenizer
from pipelib.workspace.locks import LOCK, locked
from pipelib.workspace.places import MANIFEST, StatePlaces


@dataclass(frozen=True)
class Baseline:
    """A model to measure, checked but not loaded."""

    name: str
    """Its name in `evaluate.baselines`, or the path of its folder."""
    folder: Path
    """A Hugging Face folder. A published model's may be missing if its result is kept."""
    sha256: str
    """The hash of its weights."""
    params: ModelParams
    """From its config.json, since the tensors do not show the number of heads."""
    tokenizer: Tokenizer
    """Its own, which may be another than the data's."""
    is_published: bool = False
    """Whether download fetched it."""

    @property
    def identity(self) -> dict[str, object]:
        """The part of the model that decides its scores."""
        return {"weights": self.sha256, "shape": self.params.decides()}

    def require_weights(self) -> None:
        """Refuse weights that are missing or have changed.

        Raises:
            UserError: with how to get them.
        """
        if not self.is_published:
            if weights_sha256(self.folder) != self.sha256:
                raise UserError(
                    f"{self.name} has changed since this run began, so its scores would belong to other weights; run it again."
                )
            return
        path = self.folder / WEIGHTS
        if not (is_file(path) and is_file(self.folder / CONFIG)):
            raise UserError(
                f"evaluate.baselines: {self.name}: {path} or its {CONFIG} is missing, so it cannot be measured; run "
                f"`dvc pull {MODELS}`, or dvc repro download."
            )
        require_published(self.name, sha256_file(path))


def find_baselines(names: Sequence[str], tokenizer: Tokenizer) -> list[Baseline]:
    """Find the models that `evaluate.baselines` names.

    Args:
        tokenizer: the data's, for models without one.

    Raises:
        UserError: a model is missing, or cannot be read.
    """
    found = []
    for name in names:
        if is_model_folder(name):
            found.append(require_baseline(name, tokenizer))
        else:
            sha256 = published_sha256(name)
            if sha256 is None:
                raise UserError(
                    f"evaluate.baselines: {name} is not in {MODELS / MANIFEST}, so its weights are missing; name it in "
                    "download.models and run dvc repro."
                )
            if is_hub_model(name):
                found.append(require_baseline(name, tokenizer, MODELS / folder_name(name)))
                require_published(name, found[-1].sha256)
                continue
            found.append(
                Baseline(name, MODELS / name, sha256, published_params(name), published_tokenizer(), is_published=True)
            )
    return found


def of_folder(name: str, folder: Path, tokenizer: Tokenizer) -> Baseline:
    """Find the model in a Hugging Face folder.

    Args:
        tokenizer: the data's, for a model without one.

    Raises:
        UserError: it is missing, or cannot be read.
    """
    from pipelib.model.huggingface import find_model  # imports torch

    own = tokenizer_of_model(folder, tokenizer)
    params = find_model(folder, own).model.params  # first, since its message says more about a folder without a model
    return Baseline(name, folder, weights_sha256(folder), params, own)


def require_baseline(name: str, tokenizer: Tokenizer, folder: Path | None = None) -> Baseline:
    """Find the model in a folder that `evaluate.baselines` names.

    Args:
        folder: where it is; None if that is its name.

    Raises:
        UserError: the model is missing, or cannot be read.
    """
    try:
        return of_folder(name, folder or Path(name), tokenizer)
    except UserError as error:
        raise UserError(f"evaluate.baselines: {error}") from None


def measure_once(baseline: Baseline, decides: Mapping[str, object], measure: Callable[[], Measured]) -> Measured:
    """Return the kept result of a baseline for the same inputs, or measure it now and keep the result.

    Args:
        decides: everything that decides the result besides the weights: parameters, hashes of data and code.
    """
    inputs: dict[str, Any] = {**baseline.identity, **decides}
    folder = StatePlaces.chosen().baselines / sha256_json(inputs)[:16]
    with locked(folder / LOCK, wait=True):  # a second experiment waits here, then finds the result of the first
        kept = _read(folder, inputs)
        if kept is not None:
            tell(f"evaluate: {baseline.name} was measured earlier on the same data")
            return kept
        baseline.require_weights()
        measured = measure()
        # result.json is written last: it holds the hash of items.npz and marks the folder as complete.
        write_items(folder / "items.npz", measured.items)
        sha256 = sha256_file(folder / "items.npz")
        write_json(folder / "result.json", {"inputs": inputs, "items": sha256, "result": measured.result})
        return measured


def _read(folder: Path, inputs: Mapping[str, object]) -> Measured | None:
    """Read a kept result; None if it is missing, damaged or of other inputs."""
    result, items = folder / "result.json", folder / "items.npz"
    if not (result.is_file() and items.is_file()):
        return None
    try:
        kept = read_json(result)
    except UserError as error:
        what, _, _ = str(error).rpartition("; ")  # drop its remedy: the result is replaced
        tell(f"evaluate: {what}; no action is needed: the baseline is measured again")
        return None
    if sha256_json(kept.get("inputs")) != sha256_json(inputs) or kept.get("items") != sha256_file(items):
        return None
    if not isinstance(kept.get("result"), dict):
        return None
    return Measured(kept["result"], read_items_file(items), {})
