"""OpenAI's GPT-2 weights, as Hugging Face published them: what evaluation compares with and training can start from.

Each is `NAME/model.safetensors`, unchanged, and a `NAME/config.json` that says its shape. The repositories' own config.json
is not taken: git alone keeps it, so the hub has no SHA-256 of it, and what counts of it is known.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelib.corpus.hub_lists import HubPin
from pipelib.corpus.hub_transfer import HubRepo
from pipelib.files import link_or_copy, sha256_file, write_json
from pipelib.workspace.places import MANIFEST

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Baseline:
    """A published model: where it is, and its shape (Radford et al. 2019, table 2)."""

    pin: HubPin
    n_layer: int
    n_head: int
    n_embd: int


def _pin(name: str, revision: str, sha256: str | None) -> HubPin:
    return HubPin(HubRepo(f"openai-community/{name}", revision, "model"), WEIGHTS, sha256)


BASELINES: dict[str, Baseline] = {
    "gpt2": Baseline(
        _pin(
            "gpt2",
            "607a30d783dfa663caf39e06633721c8d4cfcd7e",
            "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
        ),
        n_layer=12, n_head=12, n_embd=768,
    ),
    "gpt2-medium": Baseline(
        _pin("gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None), n_layer=24, n_head=16, n_embd=1024
    ),
    "gpt2-large": Baseline(
        _pin("gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", None), n_layer=36, n_head=20, n_embd=1280
    ),
    "gpt2-xl": Baseline(
        _pin(
            "gpt2-xl",
            "15ea56dee5df4983c59b2538573817e1667135e2",
            "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
        ),
        n_layer=48, n_head=25, n_embd=1600,
    ),
}  # fmt: skip
"""By their names in `download.models`. Where no SHA-256 stands, the hub's list at the commit decides."""


def write_baselines(
    names: Sequence[str], folder: Path, fetch: Callable[[HubPin], AbstractContextManager[Path]]
) -> dict[str, Any]:
    """Put the models that `download.models` names into `folder`.

    Args:
        folder: gets one folder per model and `manifest.json`, which is there even if no model is named.
        fetch: gives a file of the hub, verified, while it is read.

    Returns:
        The manifest: per model its repository, its revision, and the size and SHA-256 of its weights.
    """
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {}
    for name in sorted(names):
        pin = BASELINES[name].pin
        weights = folder / name / WEIGHTS
        with fetch(pin) as path:
            link_or_copy(path, weights)
        write_json(folder / name / "config.json", _config(BASELINES[name]))
        manifest[name] = {
            "repo": pin.repo.name,
            "revision": pin.repo.revision,
            "bytes": weights.stat().st_size,
            "sha256": sha256_file(weights),
        }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _config(baseline: Baseline) -> dict[str, Any]:
    """What GPT-2's config.json has to say."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": 1024,
        "n_embd": baseline.n_embd,
        "n_head": baseline.n_head,
        "n_layer": baseline.n_layer,
        "n_positions": 1024,
        "vocab_size": 50257,
    }
