"""Published weights. Evaluation compares with them, and training can start from them.

OpenAI's models are an unchanged `NAME/model.safetensors` and a `NAME/config.json` with its shape, written here. Any other model
of the hub, OWNER/NAME@COMMIT, is a folder `OWNER--NAME@COMMIT` with the weights, the config and the tokenizer of the repository.
Weights are verified by the SHA-256 that the hub has for files in git LFS, smaller files by git's SHA-1.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipelib.corpus.hub_lists import HubFile, HubPin, list_files
from pipelib.corpus.hub_store import open_store
from pipelib.corpus.hub_transfer import DEFAULT_RETRY, HubRepo, Retry
from pipelib.corpus.published_models import (
    PUBLISHED_MODELS,
    WEIGHTS,
    PublishedModel,
    folder_name,
    hash_of_weights,
    is_hub_model,
)
from pipelib.errors import UserError
from pipelib.files import link_or_copy, sha256_file, write_json
from pipelib.workspace.places import MANIFEST

CONFIG = "config.json"


def write_baselines(
    names: Sequence[str],
    folder: Path,
    fetch: Callable[[HubPin], AbstractContextManager[Path]],
    retry: Retry = DEFAULT_RETRY,
) -> dict[str, Any]:
    """Put the models that `download.models` names into `folder`.

    Args:
        folder: gets one folder per model, and `manifest.json` even if no model is named.
        fetch: opens a verified file of the hub.

    Returns:
        The manifest: per model its repository, its revision, and the size and SHA-256 of its weights.
    """
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {}
    for name in sorted(names):  # sorted, so that the order in params.yaml does not change the manifest
        if is_hub_model(name):
            manifest[name] = _write_hub_model(name, folder / folder_name(name), retry)
            continue
        model = PUBLISHED_MODELS[name]
        pin = HubPin(HubRepo(model.repo, model.revision, "model"), WEIGHTS, model.sha256)
        weights = folder / name / WEIGHTS
        with fetch(pin) as path:
            link_or_copy(path, weights)  # a hard link, so that the weights (500 MB and more) are stored once
        write_json(folder / name / CONFIG, _config(model))
        manifest[name] = {
            "repo": pin.repo.name,
            "revision": pin.repo.revision,
            "bytes": weights.stat().st_size,
            "sha256": sha256_file(weights),
        }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _repo_of(name: str) -> HubRepo:
    repo, _, revision = name.partition("@")
    return HubRepo(repo, revision, "model", section="download.models")


def hub_model_files(name: str, retry: Retry = DEFAULT_RETRY) -> list[HubFile]:
    """List the weights of a model of the hub, and the JSON files beside them. The hub is asked once; its answer is stored.

    Raises:
        UserError: the hub refuses, is unreachable, has no such model, or the model has no weights in safetensors.
    """
    found = list_files(_repo_of(name), "", ((".safetensors", ".json"),), retry)
    files = [file for file in found if file.path.endswith(".json") or file.path.startswith("model")]
    paths = [file.path for file in files]
    if CONFIG not in paths or not any(path.endswith(".safetensors") for path in paths):
        raise UserError(
            f"download.models: {name} has no {CONFIG} with weights beside it (model.safetensors, or several files), so it cannot "
            "be read; name another model."
        )
    return files


def _write_hub_model(name: str, folder: Path, retry: Retry) -> dict[str, Any]:
    """Put the files of a model of the hub into a folder, and return its entry of the manifest."""
    files, repo = hub_model_files(name, retry), _repo_of(name)
    hashes: dict[str, str] = {}
    with open_store(repo, retry) as store:
        for file, path in zip(files, store.fetch(files), strict=True):
            link_or_copy(path, folder / file.path)
            hashes[file.path] = sha256_file(folder / file.path)
    weights = {path: sha256 for path, sha256 in hashes.items() if path.endswith(".safetensors")}
    return {
        "repo": repo.name,
        "revision": repo.revision,
        "bytes": sum(file.bytes for file in files if file.path in weights),
        "sha256": hash_of_weights(weights),
        "files": hashes,
    }


def _config(model: PublishedModel) -> dict[str, Any]:
    """Return the content of GPT-2's config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": model.architecture,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": model.shape["context_length"],
        "n_embd": model.shape["n_embd"],
        "n_head": model.shape["n_head"],
        "n_layer": model.shape["n_layer"],
        "n_positions": model.shape["context_length"],
        "vocab_size": model.vocab_size,
    }
