"""The published models: OpenAI's four GPT-2, each with its shape and where its weights are. The only list of them.

Shapes are of Radford et al. 2019, table 2; the weights are those that Hugging Face published.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedModel:
    """A model that others trained, its weights pinned."""

    title: str
    """For people: `GPT-2 124M`."""
    repo: str
    """The model repository of the Hugging Face hub, OWNER/NAME."""
    revision: str
    """Its commit."""
    sha256: str | None
    """Of `model.safetensors` there; None where only the hub's list at the commit says it."""
    architecture: str
    """The family, as in `model.architecture`."""
    shape: Mapping[str, int]
    """The parameters of the family."""


def _gpt2(
    title: str, repo: str, revision: str, sha256: str | None, n_layer: int, n_head: int, n_embd: int
) -> PublishedModel:
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "context_length": 1024}
    return PublishedModel(title, f"openai-community/{repo}", revision, sha256, "gpt2", shape)


PUBLISHED_MODELS: dict[str, PublishedModel] = {
    "gpt2": _gpt2(
        "GPT-2 124M", "gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707", n_layer=12, n_head=12, n_embd=768,
    ),
    "gpt2-medium": _gpt2(
        "GPT-2 350M", "gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da", None, n_layer=24, n_head=16, n_embd=1024
    ),
    "gpt2-large": _gpt2(
        "GPT-2 774M", "gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519", None, n_layer=36, n_head=20, n_embd=1280
    ),
    "gpt2-xl": _gpt2(
        "GPT-2 1558M", "gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2",
        "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a", n_layer=48, n_head=25, n_embd=1600,
    ),
}  # fmt: skip
"""By their names in `download.models`, `model.init_from` and `evaluate.baselines`."""
