"""Export and import models in Hugging Face's format: transformers' `from_pretrained(folder)` gives the same logits.

`model_type` in config.json names the family, whose class knows the names of its tensors and settings. This module does what is
common to all families, and checks a folder for everything that can be wrong with it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipelib.corpus.published_models import WEIGHTS
from pipelib.errors import UserError, tell
from pipelib.files import read_json, write_atomic, write_json, write_text
from pipelib.model.decoder import HEAD, Decoder, family_of
from pipelib.model.params import ModelParams, family_params, known_families
from pipelib.model.recipe import write_recipe
from pipelib.model.tokenizer import how_to_cut_off, require_same_tokens, require_same_vocabulary
from pipelib.model.weights import (
    CONFIG,
    Entry,
    Weights,
    by_first_bytes,
    is_file,
    open_weights,
    require_folder,
    restore,
    weight_files,
)
from pipelib.vocabulary.chat import ChatTemplate
from pipelib.vocabulary.tokenizer import TILE, Tokenizer

GENERATION, CHAT_TEMPLATE = "generation_config.json", "chat_template.jinja"
_FLOATS = ("F64", "F32", "F16", "BF16")


def export_model(
    model: Decoder,
    tokenizer: Tokenizer,
    folder: Path,
    recipe: Mapping[str, object],
    chat: ChatTemplate | None = None,
) -> None:
    """Write config, weights (fp32, without the vocabulary's padding), tokenizer, generation config, recipe and README.

    The bytes depend only on the model, its tokenizer and the recipe.

    Args:
        recipe: everything that decided the weights, as JSON values; see `recipe.py`.
        chat: the template of the conversations that the model was trained on; None for a model that continues text.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / WEIGHTS) as file:
        file.write(save(to_huggingface(model), metadata={"format": "pt"}))
    write_json(folder / CONFIG, model.config(model.params, model.vocab_size, tokenizer.end_token_id))
    end = tokenizer.end_token_id
    # A text ends with the end token, an answer with that of its turn.
    stops = [end] if chat is None else chat.stop_token_ids
    write_json(folder / GENERATION, {"bos_token_id": end, "eos_token_id": stops if len(stops) > 1 else end})
    export_tokenizer(tokenizer, model.params.context_length, folder, chat)
    title = f"{model.params.title}, {model.params.parameters(model.vocab_size):,} parameters"
    how = ("Fine-tuned", "chat/model") if chat else ("Pretrained", "models")
    write_recipe(folder, recipe, title, model.architecture, *how)


def export_tokenizer(tokenizer: Tokenizer, context_length: int, folder: Path, chat: ChatTemplate | None = None) -> None:
    """Write the files from which transformers' AutoTokenizer reads a vocabulary, and the chat template."""
    if chat:
        write_text(folder / CHAT_TEMPLATE, chat.jinja)
    for name, content in tokenizer.files(context_length).items():
        with write_atomic(folder / name) as file:
            file.write(content)


def read_chat_template(folder: Path) -> str:
    """The chat template in a Hugging Face folder, in Jinja; empty if there is none."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"  # where it was before transformers 4.43
    found = read_json(config).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else ""


def to_huggingface(model: Decoder) -> dict[str, Tensor]:
    """Convert our tensors to Hugging Face's names and layout, in fp32 on the CPU."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float32)
        if name in model.embedding_names:
            tensor = tensor[: model.vocab_size]  # transformers expects exactly vocab_size rows
        elif name.endswith(model.transposed_names):
            tensor = tensor.t()
        renamed[name if name == HEAD else model.name_prefix + name] = tensor.contiguous()
    return renamed


# ---- Import ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A model in a folder whose config.json, tokenizer, tensor names and shapes have been checked."""

    model: Decoder
    """Its weights are not set yet; memory that is not written to takes no space."""
    entries: Mapping[str, Entry]
    """The folder's tensors by our names."""
    note: str
    """A note about the part of the folder that is not used; empty if all of it is."""


def import_model(folder: Path, tokenizer: Tokenizer, *, quiet: bool = False) -> Decoder:
    """Read the model in a Hugging Face folder, in fp32 on the CPU.

    Args:
        tokenizer: the one whose tokens the model must have.
        quiet: do not print the note about the part of the folder that is not used.

    Raises:
        UserError: `find_model` refuses the folder, it has a head or a mask that the family does not have, or a number is not
            finite.
    """
    described = _describe(folder, tokenizer)  # a wrong kind of model is reported before its weights
    with open_weights(folder) as weights, torch.no_grad():
        found = _check_tensors(folder, described, weights, tokenizer)
        if found.note and not quiet:
            tell(found.note, error=True)
        model = found.model
        state = model.state_dict()
        for name, target in state.items():
            _fill(target, name, weights.read(found.entries[name]), model)
            _require_finite(target, found.entries[name])
        # What is left are derived tensors: a tied head, masks. They are compared, not loaded.
        for name in found.entries.keys() - state.keys():
            entry = found.entries[name]
            if problem := model.derived_problem(name, weights.read(entry)):
                raise UserError(f"{entry.file}: {entry.name} {problem}")
    return model.eval()


def find_model(folder: Path, tokenizer: Tokenizer) -> Found:
    """Check the model in a Hugging Face folder without reading its weights.

    Raises:
        UserError: files are missing or damaged, the model's family is unknown, or its vocabulary is not the tokenizer's.
    """
    described = _describe(folder, tokenizer)
    with open_weights(folder) as weights:
        return _check_tensors(folder, described, weights, tokenizer)


def read_params(folder: Path, tokenizer: Tokenizer) -> ModelParams:
    """Read the parameters of the model in a Hugging Face folder from its config.json.

    Raises:
        UserError: its family is unknown, or it has another vocabulary.
    """
    return _describe(folder, tokenizer).params


class _Described(NamedTuple):
    """A model as config.json describes it."""

    family: type[Decoder]
    params: ModelParams
    config: Mapping[str, Any]


def _read_config(folder: Path) -> dict[str, Any]:
    require_folder(folder)
    path = folder / CONFIG
    if not is_file(path):
        weight_files(folder)  # raises a better message if the folder has weights in another format
        raise UserError(f"{path} does not exist, so it is unknown which model this is; {restore(folder)}.")
    if what := by_first_bytes(path):
        raise UserError(f"{path} {what}.")
    return read_json(path, restore(folder))


def _describe(folder: Path, tokenizer: Tokenizer) -> _Described:
    config, path = _read_config(folder), folder / CONFIG
    for key in ("model_type", "vocab_size"):
        if key not in config:
            raise UserError(
                f"{path} has no {key}, so it is unknown which model this is; use the {CONFIG} published with the model."
            )
    if config["model_type"] not in known_families():
        raise UserError(
            f"{path} has model_type = {config['model_type']!r}, and this code knows only "
            f"{', '.join(known_families())}, so its logits could not be computed; use a model of a known type."
        )
    family = family_of(config["model_type"])
    title = family_params(family.architecture).title
    for key, allowed in family.config_settings.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path} has {key} = {config[key]!r} where {title} has {allowed[0]!r}, so its logits would be wrong; "
                f"use a {title} as published."
            )
    require_same_vocabulary(folder, tokenizer)
    if config["vocab_size"] not in _sizes(tokenizer):
        raise UserError(
            f"{path} has vocab_size = {config['vocab_size']!r} where {tokenizer.title} has {tokenizer.size}, so its tokens are "
            f"not those of the data; {how_to_cut_off(folder, tokenizer)}"
        )
    problems: list[str] = []
    params = family.params_of(config, problems)
    if params is None or problems:
        raise UserError(f"{path} does not describe a {title}: {' '.join(problems)}")
    return _Described(family, params, config)


def _sizes(tokenizer: Tokenizer) -> list[int]:
    """The numbers of rows that an embedding may have: exact, or padded for the hardware, as 50,304 in nanoGPT's GPT-2.

    Qwen3's padding is larger than the hardware wants: 151,936 rows for 151,669 tokens.
    """
    exact = [-(-tokenizer.size // multiple) * multiple for multiple in (1, 8, 16, 32, 64, 256, 512, 1024)]
    return [*exact, *range(tokenizer.padded_size, tokenizer.size + 1024, TILE)]


def _check_tensors(folder: Path, described: _Described, weights: Weights, tokenizer: Tokenizer) -> Found:
    """Check the names and shapes of the tensors, and the tokens, and make the model that they belong to."""
    family, params, config = described
    entries = _by_our_names(weights, family)
    rows = _embedding_rows(entries.get(family.embedding_names[0]), config["vocab_size"], tokenizer)
    lines = list(_size_differences(family, params, entries, rows))
    if not lines:  # else config.json could ask for a model of any size
        with _NoInitialisation():
            model = family(params, tokenizer.size)
        lines = list(_differences(family, _shapes_in_files(model, rows), entries))
    is_tied = config.get("tie_word_embeddings", True) is True
    if not lines and HEAD in family.derived_names and HEAD not in entries and not is_tied:
        lines = [f"{HEAD} is missing, and tie_word_embeddings is {config['tie_word_embeddings']!r}"]
    if lines:
        shapes = {name: entry.shape for name, entry in entries.items()}
        raise UserError(
            f"{next(iter(entries.values())).file if entries else folder / WEIGHTS} does not fit its {CONFIG} "
            f"({', '.join(lines[:5])}), so the model would be wrong; {family.other_layout(params, shapes) or restore(folder)}."
        )
    require_same_tokens(folder, rows, tokenizer)
    extra = rows - tokenizer.size
    beyond = f"beyond {tokenizer.title}'s {tokenizer.size:,} tokens"
    note = f"{folder}: the {extra} rows of its embedding {beyond} are padding and are not used"
    return Found(model, entries, note if extra else "")


class _NoInitialisation(TorchFunctionMode):
    """Leave new weights uninitialized: drawing random numbers to overwrite them takes longer than reading the file.

    torch's own ways import 800 modules first (the device `meta`, a second), or work for single layers only (`skip_init`).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_):
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def _embedding_rows(embedding: Entry | None, vocab_size: int, tokenizer: Tokenizer) -> int:
    """The rows of the token embedding if their number is valid, padded or not; else the number in config.json."""
    shape = embedding.shape if embedding else ()
    valid = bool(shape) and shape[0] in _sizes(tokenizer) and vocab_size in (tokenizer.size, shape[0])
    return shape[0] if valid else vocab_size


def _size_differences(
    family: type[Decoder], params: ModelParams, entries: Mapping[str, Entry], rows: int
) -> Iterator[str]:
    """Where the sizes in config.json differ from the files. A model of wrong sizes could fill the memory."""
    outer = family.outer_shapes(params, rows)
    yield from _differences(family, outer, {name: entries[name] for name in outer if name in entries})
    if family.block_list:
        before, key = f"{family.block_list[0]}.", family.block_list[1]
        blocks = {name.removeprefix(before).split(".")[0] for name in entries if name.startswith(before)}
        if len(blocks) != getattr(params, key):
            yield f"it has {len(blocks)} blocks, and {key} is {getattr(params, key)}"


def _shapes_in_files(model: Decoder, rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our tensors in Hugging Face's layout, with `rows` rows in the embeddings."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: shape[::-1] if name.endswith(model.transposed_names) else shape for name, shape in shapes.items()}
    return theirs | {name: (rows, *shapes[name][1:]) for name in model.embedding_names}


def _differences(
    family: type[Decoder], expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]
) -> Iterator[str]:
    """Tensors that are missing, unknown or of another shape, sorted by name."""
    known = {name for name in entries if name in expected or not name.endswith(family.derived_names)}
    for name in sorted(expected.keys() | known):
        if name not in entries:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is not a tensor of {family_params(family.architecture).title}"
        elif entries[name].shape != expected[name]:
            yield f"{name} is {entries[name].shape}, not {expected[name]}"


def _by_our_names(weights: Weights, family: type[Decoder]) -> dict[str, Entry]:
    """The tensors by our names: without the prefixes of torch.compile, DDP and transformers.

    Raises:
        UserError: two tensors then have the same name, or one does not hold floating-point numbers.
    """
    entries: dict[str, Entry] = {}
    for entry in weights.entries:
        name = entry.name.replace("_orig_mod.", "").removeprefix("module.").removeprefix(family.name_prefix)
        if name in entries:
            raise UserError(
                f"{entry.file} has {entry.name} and {entries[name].name}, so it is unclear which of the two to use; use a model "
                "as transformers saves it."
            )
        if entry.dtype not in _FLOATS and not name.endswith(family.derived_names):
            raise UserError(
                f"{entry.file}: {entry.name} is of type {entry.dtype}, so its weights are quantised or damaged; use a model in "
                "fp32, fp16 or bf16."
            )
        entries[name] = entry
    return entries


def _fill(target: Tensor, name: str, tensor: Tensor, model: Decoder) -> None:
    """Copy a tensor of a file into ours, in our layout. The padding of the vocabulary becomes zero."""
    if name in model.embedding_names:
        target[model.vocab_size :] = 0
        target[: model.vocab_size] = tensor[: model.vocab_size]
    else:
        target.copy_(tensor.t() if name.endswith(model.transposed_names) else tensor)


def _require_finite(tensor: Tensor, entry: Entry) -> None:
    if not torch.stack(tensor.aminmax()).isfinite().all():  # no copy of the tensor: aminmax returns NaN if there is one
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise UserError(
            f"{entry.file}: {entry.name} has {bad:,} numbers of {tensor.numel():,} that are infinite or not numbers, so "
            "nothing could be computed with it: its training diverged, or the file is damaged; use an earlier checkpoint, "
            f"or {restore(entry.file.parent)}."
        )
