"""Models in Hugging Face's form, out and in: transformers' `from_pretrained(folder)` gives the same logits.

`model_type` in config.json names the family, which says what its tensors and settings are called there. What is common to all
folders, and every way in which one can be wrong, is here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipelib.errors import UserError, tell
from pipelib.files import read_json, write_atomic, write_json
from pipelib.model.decoder import HEAD, Decoder, family_of
from pipelib.model.params import ModelParams, family_params, known_families
from pipelib.model.recipe import write_recipe
from pipelib.model.tokenizer import how_to_cut_off, require_same_tokens
from pipelib.model.weights import (
    CONFIG,
    WEIGHTS,
    Entry,
    Weights,
    by_first_bytes,
    is_file,
    open_weights,
    require_folder,
    restore,
    weight_files,
)
from pipelib.vocabulary.tokenizer import Tokenizer

_FLOATS = ("F64", "F32", "F16", "BF16")


def export_model(model: Decoder, tokenizer: Tokenizer, folder: Path, recipe: Mapping[str, object]) -> None:
    """Write config, weights (fp32, without the vocabulary's padding), tokenizer, generation config, recipe and README.

    The bytes are a function of the weights and the recipe alone.

    Args:
        recipe: everything that decided the weights, as JSON; see `recipe.py`.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / WEIGHTS) as file:
        file.write(save(to_huggingface(model), metadata={"format": "pt"}))
    write_json(folder / CONFIG, model.config(model.params, model.vocab_size, tokenizer.end_token_id))
    ends = {"bos_token_id": tokenizer.end_token_id, "eos_token_id": tokenizer.end_token_id}
    write_json(folder / "generation_config.json", ends)
    for name, content in tokenizer.files(model.params.context_length).items():
        with write_atomic(folder / name) as file:
            file.write(content)
    title = f"{model.params.title}, {model.params.parameters(model.vocab_size):,} parameters"
    write_recipe(folder, recipe, title, model.architecture)


def to_huggingface(model: Decoder) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names and in its layout, in fp32 on the CPU."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float32)
        if name in model.embedding_names:
            tensor = tensor[: model.vocab_size]
        elif name.endswith(model.transposed_names):
            tensor = tensor.t()
        renamed[model.name_prefix + name] = tensor.contiguous()
    return renamed


# ---- In --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A model in a folder, judged by its config.json, its tokenizer, and the names and shapes of its tensors."""

    model: Decoder
    """Its numbers are not set yet; memory that nobody has written to takes no room."""
    entries: Mapping[str, Entry]
    """The folder's tensors under our names."""
    note: str
    """What of the folder is not used; empty where everything is."""


def import_model(folder: Path, tokenizer: Tokenizer, *, quiet: bool = False) -> Decoder:
    """The model of a Hugging Face folder, in fp32 on the CPU.

    Args:
        tokenizer: whose tokens the model has to have.
        quiet: leave out the line on stderr that says what of the folder is not used.

    Raises:
        UserError: what `find_model` refuses; a head or a mask that the family does not have; numbers that are not finite.
    """
    described = _describe(folder, tokenizer)  # what a model is counts before what its weights look like
    with open_weights(folder) as weights, torch.no_grad():
        found = _look_at(folder, described, weights, tokenizer)
        if found.note and not quiet:
            tell(found.note, error=True)
        model = found.model
        state = model.state_dict()
        for name, target in state.items():
            _fill(target, name, weights.read(found.entries[name]), model)
            _require_finite(target, found.entries[name])
        for name in found.entries.keys() - state.keys():
            entry = found.entries[name]
            if problem := model.derived_problem(name, weights.read(entry)):
                raise UserError(f"{entry.file}: {entry.name} {problem}")
    return model.eval()


def find_model(folder: Path, tokenizer: Tokenizer) -> Found:
    """Look at the model in a Hugging Face folder without reading its numbers.

    Raises:
        UserError: files are missing or damaged, the model is of no family here, or its vocabulary is not the tokenizer's.
    """
    described = _describe(folder, tokenizer)
    with open_weights(folder) as weights:
        return _look_at(folder, described, weights, tokenizer)


def read_params(folder: Path, tokenizer: Tokenizer) -> ModelParams:
    """The shape of the model in a Hugging Face folder, as its config.json says.

    Raises:
        UserError: it is of no family here, or has another vocabulary.
    """
    return _describe(folder, tokenizer).params


class _Described(NamedTuple):
    """What config.json says of a model."""

    family: type[Decoder]
    params: ModelParams
    config: Mapping[str, Any]


def _read_config(folder: Path) -> dict[str, Any]:
    require_folder(folder)
    path = folder / CONFIG
    if not is_file(path):
        weight_files(folder)  # what lies there instead says more
        raise UserError(f"{path} does not exist, so nothing says which model this is; {restore(folder)}.")
    if what := by_first_bytes(path):
        raise UserError(f"{path} {what}.")
    return read_json(path, restore(folder))


def _describe(folder: Path, tokenizer: Tokenizer) -> _Described:
    config, path = _read_config(folder), folder / CONFIG
    for key in ("model_type", "vocab_size"):
        if key not in config:
            raise UserError(f"{path} has no {key}, so nothing says which model this is; use one as published.")
    if config["model_type"] not in known_families():
        raise UserError(
            f"{path} has model_type = {config['model_type']!r}, and this code has {', '.join(known_families())}, so its logits "
            "could not be computed; use a model of these."
        )
    family = family_of(config["model_type"])
    title = family_params(family.architecture).title
    for key, allowed in family.config_settings.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path} has {key} = {config[key]!r} where {title} has {allowed[0]!r}, so its logits would come out wrong; "
                f"use a {title} as published."
            )
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
    """Rows of an embedding, as they are or padded for the hardware: 50,304 in nanoGPT's GPT-2, for one."""
    return [-(-tokenizer.size // multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128, 256, 512, 1024)]


def _look_at(folder: Path, described: _Described, weights: Weights, tokenizer: Tokenizer) -> Found:
    family, params, config = described
    entries = _by_own_names(weights, family)
    rows = _embedding_rows(entries.get(family.embedding_names[0]), config["vocab_size"], tokenizer)
    lines = list(_outer_differences(family, params, entries, rows))
    if not lines:  # else the file bounds nothing of what would be made here
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
    note = f"{folder}: the {extra} rows of its embedding {beyond} are padding, and not used"
    return Found(model, entries, note if extra else "")


class _NoInitialisation(TorchFunctionMode):
    """Leave new weights as the memory is: drawing numbers that are overwritten takes longer than reading those of a file.

    torch's own ways load 800 modules first (the device `meta`: a second), or know single layers alone (`skip_init`).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_):
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def _embedding_rows(embedding: Entry | None, vocab_size: int, tokenizer: Tokenizer) -> int:
    """The rows of the token embedding where they are good, padded or not; else those that config.json asks for."""
    shape = embedding.shape if embedding else ()
    good = bool(shape) and shape[0] in _sizes(tokenizer) and vocab_size in (tokenizer.size, shape[0])
    return shape[0] if good else vocab_size


def _outer_differences(
    family: type[Decoder], params: ModelParams, entries: Mapping[str, Entry], rows: int
) -> Iterator[str]:
    """Whether the sizes that config.json gives are those of the files; a model of other sizes could fill the memory."""
    outer = family.outer_shapes(params, rows)
    yield from _differences(family, outer, {name: entries[name] for name in outer if name in entries})
    if family.block_list:
        before, key = f"{family.block_list[0]}.", family.block_list[1]
        blocks = {name.removeprefix(before).split(".")[0] for name in entries if name.startswith(before)}
        if len(blocks) != getattr(params, key):
            yield f"it has {len(blocks)} blocks, and {key} is {getattr(params, key)}"


def _shapes_in_files(model: Decoder, rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our tensors in Hugging Face's layout, with so many rows of embeddings."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    turned = {name: shape[::-1] if name.endswith(model.transposed_names) else shape for name, shape in shapes.items()}
    return turned | {name: (rows, *shapes[name][1:]) for name in model.embedding_names}


def _differences(
    family: type[Decoder], expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]
) -> Iterator[str]:
    """Tensors that are missing, of another shape, or unknown, in the order of their names."""
    known = {name for name in entries if name in expected or not name.endswith(family.derived_names)}
    for name in sorted(expected.keys() | known):
        if name not in entries:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is not a tensor of {family_params(family.architecture).title}"
        elif entries[name].shape != expected[name]:
            yield f"{name} is {entries[name].shape}, not {expected[name]}"


def _by_own_names(weights: Weights, family: type[Decoder]) -> dict[str, Entry]:
    """The tensors by our names: without what torch.compile, DDP and transformers put before them.

    Raises:
        UserError: two have the same name then, or one holds something other than floating-point numbers.
    """
    entries: dict[str, Entry] = {}
    for entry in weights.entries:
        name = entry.name.replace("_orig_mod.", "").removeprefix("module.").removeprefix(family.name_prefix)
        if name in entries:
            raise UserError(
                f"{entry.file} has {entry.name} and {entries[name].name}, so it is unclear which of them counts; use a model "
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
    """Copy a tensor of a file into ours, in our layout; the padding of the vocabulary is zero."""
    if name in model.embedding_names:
        target[model.vocab_size :] = 0
        target[: model.vocab_size] = tensor[: model.vocab_size]
    else:
        target.copy_(tensor.t() if name.endswith(model.transposed_names) else tensor)


def _require_finite(tensor: Tensor, entry: Entry) -> None:
    if not torch.stack(tensor.aminmax()).isfinite().all():  # without a copy: what is not a number is least and greatest
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise UserError(
            f"{entry.file}: {entry.name} has {bad:,} numbers of {tensor.numel():,} that are infinite or not numbers, so "
            "nothing could be computed with it: its training diverged, or the file is damaged; use an earlier checkpoint, "
            f"or {restore(entry.file.parent)}."
        )
