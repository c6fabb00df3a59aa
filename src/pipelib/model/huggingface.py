"""GPT-2 in Hugging Face's form, out and in: `GPT2LMHeadModel.from_pretrained(folder)` gives the same logits.

Hugging Face keeps OpenAI's Conv1D layout, (in, out), where ours is torch's Linear, (out, in), so four matrices of every
block are transposed. For the square ones nothing but a wrong result would show a mistake, hence the test against
transformers.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipelib.errors import UserError, tell
from pipelib.files import read_json, write_atomic, write_json, write_text
from pipelib.model.gpt import GPT
from pipelib.model.params import ModelParams
from pipelib.model.tokenizer import how_to_cut_off, require_same_tokens
from pipelib.model.weights import (
    CONFIG,
    GUIDE,
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
from pipelib.schema import parse
from pipelib.vocabulary.tokenizer import Tokenizer

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_PREFIX = "transformer."
_HEAD, _EMBEDDING, _POSITIONS = "lm_head.weight", "wte.weight", "wpe.weight"
_DERIVED = (_HEAD, ".attn.bias", ".attn.masked_bias")
"""Tensors that some files carry and that follow from the others in GPT-2: the tied head, and causal masks."""
_GPT2: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
"""What config.json must say where it says it; other values are other architectures under GPT-2's name."""
_FLOATS = ("F64", "F32", "F16", "BF16")


def export_model(model: GPT, tokenizer: Tokenizer, folder: Path, readme: str) -> None:
    """Write config, weights (fp32, without the vocabulary's padding), tokenizer, generation config and README.

    The bytes are a function of the weights and `readme` alone.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / WEIGHTS) as file:
        file.write(save(to_huggingface(model), metadata={"format": "pt"}))
    write_json(folder / CONFIG, _config(model, tokenizer))
    ends = {"bos_token_id": tokenizer.end_token_id, "eos_token_id": tokenizer.end_token_id}
    write_json(folder / "generation_config.json", ends)
    for name, content in tokenizer.files(model.params.context_length).items():
        with write_atomic(folder / name) as file:
            file.write(content)
    write_text(folder / "README.md", readme)


def _config(model: GPT, tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json, in the order of OpenAI's."""
    params = model.params
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": tokenizer.end_token_id,
        "eos_token_id": tokenizer.end_token_id,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_ctx": params.context_length,
        "n_embd": params.n_embd,
        "n_head": params.n_head,
        "n_inner": None,
        "n_layer": params.n_layer,
        "n_positions": params.context_length,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "vocab_size": model.vocab_size,
    }


def to_huggingface(model: GPT) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names and in its layout, in fp32 on the CPU."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float32)
        if name == "wte.weight":
            tensor = tensor[: model.vocab_size]
        elif name.endswith(_TRANSPOSED):
            tensor = tensor.t()
        renamed[_PREFIX + name] = tensor.contiguous()
    return renamed


# ---- In --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A GPT-2 in a folder, judged by its config.json, its tokenizer, and the names and shapes of its tensors."""

    model: GPT
    """Its numbers are not set yet; memory that nobody has written to takes no room."""
    entries: Mapping[str, Entry]
    """The folder's tensors under our names."""
    note: str
    """What of the folder is not used; empty where everything is."""


def import_model(folder: Path, tokenizer: Tokenizer, *, quiet: bool = False) -> GPT:
    """A GPT-2 from a Hugging Face folder, in fp32 on the CPU.

    Args:
        tokenizer: whose tokens the model has to have.
        quiet: leave out the line on stderr that says what of the folder is not used.

    Raises:
        UserError: what `find_model` refuses; a head or a mask that GPT-2 does not have; numbers that are not finite.
    """
    with open_weights(_with_config(folder, tokenizer)) as weights, torch.no_grad():
        found = _look_at(folder, weights, tokenizer)
        if found.note and not quiet:
            tell(found.note, error=True)
        model = found.model
        state = model.state_dict()
        for name, target in state.items():
            _fill(target, name, weights.read(found.entries[name]), tokenizer.size)
            _require_finite(target, found.entries[name])
        for name in found.entries.keys() - state.keys():
            _require_derived(found.entries[name], weights.read(found.entries[name]), model)
    return model.eval()


def find_model(folder: Path, tokenizer: Tokenizer) -> Found:
    """Look at the model in a Hugging Face folder without reading its numbers.

    Raises:
        UserError: files are missing or damaged, the model is not a GPT-2, or its vocabulary is not the tokenizer's.
    """
    with open_weights(_with_config(folder, tokenizer)) as weights:
        return _look_at(folder, weights, tokenizer)


def read_params(folder: Path, tokenizer: Tokenizer) -> ModelParams:
    """The shape of the model in a Hugging Face folder, as its config.json says.

    Raises:
        UserError: it is not a GPT-2 with this vocabulary.
    """
    return _params_of(folder, _read_config(folder), tokenizer)


def _with_config(folder: Path, tokenizer: Tokenizer) -> Path:
    """The folder, once its config.json describes a GPT-2: what it is counts before what its weights look like."""
    read_params(folder, tokenizer)
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    require_folder(folder)
    path = folder / CONFIG
    if not is_file(path):
        weight_files(folder)  # what lies there instead says more
        raise UserError(f"{path} does not exist, so nothing says that this is a GPT-2; {restore(folder)}.")
    if what := by_first_bytes(path):
        raise UserError(f"{path} {what}.")
    return read_json(path, restore(folder))


def _params_of(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> ModelParams:
    path = folder / CONFIG
    for key in ("model_type", "vocab_size"):
        if key not in config:
            raise UserError(f"{path} has no {key}, so nothing says that this is a GPT-2; use one as published.")
    for key, allowed in _GPT2.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path} has {key} = {config[key]!r} where GPT-2 has {allowed[0]!r}, so its logits would come out wrong; "
                "use a GPT-2 as published."
            )
    if config["vocab_size"] not in _sizes(tokenizer):
        raise UserError(
            f"{path} has vocab_size = {config['vocab_size']!r} where {tokenizer.title} has {tokenizer.size}, so its tokens are "
            f"not those of the data; {how_to_cut_off(folder, tokenizer)}"
        )
    shape = {"context_length": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}
    problems: list[str] = []
    params = parse(ModelParams, {ours: config.get(theirs) for ours, theirs in shape.items()}, "", problems)
    if params is not None and config.get("n_inner") not in (None, 4 * params.n_embd):
        problems.append(f"n_inner is {config['n_inner']}, not 4 times n_embd.")
    if params is None or problems:
        raise UserError(f"{path} does not describe a GPT-2: {' '.join(problems)}")
    return params


def _sizes(tokenizer: Tokenizer) -> list[int]:
    """Rows of an embedding, as they are or padded for the hardware: 50,304 in nanoGPT's GPT-2, for one."""
    return [-(-tokenizer.size // multiple) * multiple for multiple in (1, 8, 16, 32, 64, 128, 256, 512, 1024)]


def _look_at(folder: Path, weights: Weights, tokenizer: Tokenizer) -> Found:
    config = _read_config(folder)
    params, entries = _params_of(folder, config, tokenizer), _by_own_names(weights)
    rows = _embedding_rows(entries, config["vocab_size"], tokenizer)
    lines = list(_outer_differences(params, entries, rows))
    if not lines:  # else the file bounds nothing of what would be made here
        with _NoInitialisation():
            model = GPT(params, tokenizer.size)
        lines = list(_differences(_shapes_in_files(model, rows), entries))
    if not lines and _HEAD not in entries and config.get("tie_word_embeddings", True) is not True:
        lines = [f"{_HEAD} is missing, and tie_word_embeddings is {config['tie_word_embeddings']!r}"]
    if lines:
        raise UserError(
            f"{next(iter(entries.values())).file if entries else folder / WEIGHTS} does not fit its {CONFIG} "
            f"({', '.join(lines[:5])}), so the model would be wrong; {_other_layout(params, entries) or restore(folder)}."
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


def _embedding_rows(entries: Mapping[str, Entry], vocab_size: int, tokenizer: Tokenizer) -> int:
    """The rows of the token embedding where they are good, padded or not; else those that config.json asks for."""
    shape = entries[_EMBEDDING].shape if _EMBEDDING in entries else ()
    good = bool(shape) and shape[0] in _sizes(tokenizer) and vocab_size in (tokenizer.size, shape[0])
    return shape[0] if good else vocab_size


def _outer_differences(params: ModelParams, entries: Mapping[str, Entry], rows: int) -> Iterator[str]:
    """Whether the sizes that config.json gives are those of the files; a model of other sizes could fill the memory."""
    outer = {_EMBEDDING: (rows, params.n_embd), _POSITIONS: (params.context_length, params.n_embd)}
    yield from _differences(outer, {name: entries[name] for name in outer if name in entries})
    blocks = {name.split(".")[1] for name in entries if name.startswith("h.")}
    if len(blocks) != params.n_layer:
        yield f"it has {len(blocks)} blocks, and n_layer is {params.n_layer}"


def _shapes_in_files(model: GPT, rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of our tensors in Hugging Face's layout, with so many rows of the token embedding."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    turned = {name: shape[::-1] if name.endswith(_TRANSPOSED) else shape for name, shape in shapes.items()}
    return turned | {_EMBEDDING: (rows, model.params.n_embd)}


def _differences(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]) -> Iterator[str]:
    """Tensors that are missing, of another shape, or unknown, in the order of their names."""
    known = {name for name in entries if not name.endswith(_DERIVED)}
    for name in sorted(expected.keys() | known):
        if name not in entries:
            yield f"{name} is missing"
        elif name not in expected:
            yield f"{name} is not a tensor of GPT-2"
        elif entries[name].shape != expected[name]:
            yield f"{name} is {entries[name].shape}, not {expected[name]}"


def _other_layout(params: ModelParams, entries: Mapping[str, Entry]) -> str:
    """The remedy where the matrices are those of torch's Linear, (out, in), as nanoGPT has them."""
    matrix = entries.get("h.0.attn.c_attn.weight")
    turned = matrix is not None and matrix.shape == (3 * params.n_embd, params.n_embd)
    return f"its matrices are as nanoGPT has them: convert the checkpoint itself, see {GUIDE}" if turned else ""


def _by_own_names(weights: Weights) -> dict[str, Entry]:
    """The tensors by our names: without what torch.compile, DDP and transformers put before them.

    Raises:
        UserError: two have the same name then, or one holds something other than floating-point numbers.
    """
    entries: dict[str, Entry] = {}
    for entry in weights.entries:
        name = entry.name.replace("_orig_mod.", "").removeprefix("module.").removeprefix(_PREFIX)
        if name in entries:
            raise UserError(
                f"{entry.file} has {entry.name} and {entries[name].name}, so it is unclear which of them counts; use a model "
                "as transformers saves it."
            )
        if entry.dtype not in _FLOATS and not name.endswith(_DERIVED):
            raise UserError(
                f"{entry.file}: {entry.name} is of type {entry.dtype}, so its weights are quantised or damaged; use a model in "
                "fp32, fp16 or bf16."
            )
        entries[name] = entry
    return entries


def _fill(target: Tensor, name: str, tensor: Tensor, vocab_size: int) -> None:
    """Copy a tensor of a file into ours, in our layout; the padding of the vocabulary is zero."""
    if name == _EMBEDDING:
        target[vocab_size:] = 0
        target[:vocab_size] = tensor[:vocab_size]
    else:
        target.copy_(tensor.t() if name.endswith(_TRANSPOSED) else tensor)


def _require_finite(tensor: Tensor, entry: Entry) -> None:
    if not torch.stack(tensor.aminmax()).isfinite().all():  # without a copy: what is not a number is least and greatest
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise UserError(
            f"{entry.file}: {entry.name} has {bad:,} numbers of {tensor.numel():,} that are infinite or not numbers, so "
            "nothing could be computed with it: its training diverged, or the file is damaged; use an earlier checkpoint, "
            f"or {restore(entry.file.parent)}."
        )


def _require_derived(entry: Entry, tensor: Tensor, model: GPT) -> None:
    """Refuse a head that is not the token embedding, and a mask that is not causal.

    Raises:
        UserError: naming the tensor.
    """
    if entry.name.endswith(_HEAD):
        embedding = model.wte.weight[: model.vocab_size]
        same = tensor.shape[1:] == embedding.shape[1:] and len(tensor) >= model.vocab_size
        if not (same and torch.equal(tensor[: model.vocab_size].to(embedding.dtype), embedding)):
            raise UserError(
                f"{entry.file}: {entry.name} is not the token embedding, so the model has a head of its own, which GPT-2 does "
                "not have and this code would not use; use a model whose head is tied to the embedding."
            )
    elif not (_is_causal(tensor) if entry.name.endswith(".attn.bias") else _is_minus_infinity(tensor)):
        raise UserError(
            f"{entry.file}: {entry.name} is not the causal mask of GPT-2, so its attention would look elsewhere than ours; use "
            "a GPT-2 as published."
        )


def _is_causal(mask: Tensor) -> bool:
    """Whether a mask (..., T, T) is one up to each position and zero beyond it."""
    size = mask.shape[-1] if mask.dim() > 1 else 0
    return mask.numel() == size * size > 0 and torch.equal(
        mask.reshape(-1, size).to(torch.float32), torch.ones(mask.numel() // size, size).tril()
    )


def _is_minus_infinity(bias: Tensor) -> bool:
    """Whether a position with this number added to its score has no weight: -10,000 in OpenAI's files."""
    return bias.numel() == 1 and bias.item() <= -1e4


def readme(params: ModelParams, vocab_size: int, recipe: dict[str, object]) -> str:
    """The README of an exported model: a function of the stage's inputs, so that equal inputs give equal bytes."""
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in recipe.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, pipelib]\n---\n\n"
        f"# GPT-2, {params.parameters(vocab_size):,} parameters\n\n"
        "Pretrained by pipelib. Load it with transformers:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("models")\n'
        'tokenizer = AutoTokenizer.from_pretrained("models")\n```\n\n'
        "Everything that decided these weights:\n\n"
        f"| what | value |\n|---|---|\n{rows}\n"
    )
