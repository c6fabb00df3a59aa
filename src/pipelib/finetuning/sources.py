"""Where conversations come from, and the model that is trained on them: what the stage must know before it works."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pipelib.corpus.published_models import folder_name
from pipelib.errors import UserError, tell
from pipelib.files import read_json, sha256_file, sha256_json
from pipelib.finetuning.docs import DocsConversations
from pipelib.finetuning.local import HubConversations, LocalConversations
from pipelib.finetuning.params import BASE, FinetuneParams
from pipelib.model.params import known_families
from pipelib.model.weights import CONFIG, MODELS, require_published, restore, weights_sha256
from pipelib.tokens.shards import read_manifest
from pipelib.vocabulary.chat import Message
from pipelib.workspace.places import HERE
from pipelib.workspace.provenance import chosen_files, code_hash


class Conversations(Protocol):
    """A source of conversations."""

    @property
    def bad_rows(self) -> Counter[str]:
        """Rows that were left out, by reason, once all are read."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return everything that pins the conversations."""

    def finish(self) -> None:
        """Print what was left out, once all are read.

        Raises:
            UserError: too many rows are not conversations.
        """

    def read(self) -> Iterator[tuple[str, list[Message]]]:
        """Yield each conversation with its file and row, or its name."""


def find_conversations(params: FinetuneParams) -> Conversations:
    """Find the source that `finetune.source` names.

    Raises:
        UserError: it is not there.
    """
    if params.source == "local":
        return LocalConversations(params)
    if params.source == "hub":
        return HubConversations(params)
    manifest = read_manifest(HERE.tokens)
    validation = sum(shard.documents for shard in manifest.split("val"))
    # One more: GPT-2's validation split may end in the middle of a document.
    return DocsConversations(HERE.raw, validation + 1)


def chosen_for(params: FinetuneParams, kind: str) -> FinetuneParams:
    """Return the parameters for a corpus of this kind: only docstrings can be asked about by `source: docs`."""
    if params.source != "docs" or kind == "docs":
        return params
    tell(
        f"finetune: source: docs makes conversations from docstrings, and the corpus is of the source {kind}, so there is no "
        "fine-tuning; finetune.source: local reads conversations of yours"
    )
    return replace(params, source="none")


def base_folder(params: FinetuneParams) -> Path:
    """Return the folder of the model that `finetune.init_from` names."""
    if params.init_from == BASE:
        return HERE.model
    return Path(params.init_from) if params.init_is_folder else MODELS / folder_name(params.init_from)


def finetune_inputs(params: FinetuneParams) -> dict[str, object]:
    """Return everything that decides the result.

    Raises:
        UserError: the conversations or the model are missing.
    """
    if params.source == "none":
        return {"finetune": params.decides()}
    folder = base_folder(params)
    try:
        sha256 = weights_sha256(folder)
    except UserError as error:
        raise UserError(f"finetune.init_from: {error}") from None
    if params.init_from != BASE and not params.init_is_folder:
        require_published(params.init_from, sha256)
    return {
        **({} if params.init_from == BASE else {"family": _family_code(folder)}),
        "finetune": params.decides(),
        "conversations": find_conversations(params).identity(),
        "base": sha256,
        "base files": {name: sha256_file(folder / name) for name in DESCRIBES if (folder / name).is_file()},
        "data": read_manifest(HERE.tokens).fingerprint,  # for what the model has forgotten
    }


DESCRIBES = (
    CONFIG, "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""Files of a base that decide how its weights are used."""


def _family_code(folder: Path) -> dict[str, str]:
    """Return the hash of the code of a base's family, which need not be the one that `model.architecture` chooses."""
    family = read_json(folder / CONFIG, restore(folder)).get("model_type")
    if family not in known_families():
        return {}  # the error that follows says more
    paths = chosen_files("finetune", {"model.architecture": family})
    return {path.as_posix(): code_hash(path.read_text(encoding="utf-8")) for path in paths}


def lineage(
    params: FinetuneParams, inputs: Mapping[str, Any], tokens_sha256: str, base_recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a fine-tuned model was made from, by content.

    Args:
        inputs: of the stage.
        tokens_sha256: of the conversations as tokens.
        base_recipe: what decided the base's weights; empty if that is not known.
    """
    source = inputs["conversations"]
    base: dict[str, Any] = {"init_from": params.init_from, "weights_sha256": inputs["base"]}
    if base_recipe:
        base["recipe"] = dict(base_recipe)
    return {
        "conversations": {"source": source, "sha256": sha256_json(source), "tokens_sha256": tokens_sha256},
        "base": base,
    }
