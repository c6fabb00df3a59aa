"""OpenAI's GPT-2 weights, as Hugging Face published them. Evaluation compares with them, and training can start from them.

Each model is an unchanged `NAME/model.safetensors` and a `NAME/config.json` with its shape. The config.json of the hub's
repository is not used: it is kept in plain git, for which the hub has no SHA-256, and the values that matter are known.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipelib.corpus.hub_lists import HubPin
from pipelib.corpus.hub_transfer import HubRepo
from pipelib.corpus.published_models import PUBLISHED_MODELS, PublishedModel
from pipelib.files import link_or_copy, sha256_file, write_json
from pipelib.workspace.places import MANIFEST

WEIGHTS = "model.safetensors"


def write_baselines(
    names: Sequence[str], folder: Path, fetch: Callable[[HubPin], AbstractContextManager[Path]]
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
        model = PUBLISHED_MODELS[name]
        pin = HubPin(HubRepo(model.repo, model.revision, "model"), WEIGHTS, model.sha256)
        weights = folder / name / WEIGHTS
        with fetch(pin) as path:
            link_or_copy(path, weights)  # a hard link, so that the weights (500 MB and more) are stored once
        write_json(folder / name / "config.json", _config(model))
        manifest[name] = {
            "repo": pin.repo.name,
            "revision": pin.repo.revision,
            "bytes": weights.stat().st_size,
            "sha256": sha256_file(weights),
        }
    write_json(folder / MANIFEST, manifest)
    return manifest


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
