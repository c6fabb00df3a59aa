"""GPT-2 in Hugging Face's form, out and in: `GPT2LMHeadModel.from_pretrained(folder)` gives the same logits.

Hugging Face keeps OpenAI's Conv1D layout, (in, out), where ours is torch's Linear, (out, in), so four matrices of every
block are transposed. For the square ones nothing but a wrong result would show a mistake, hence the test against
transformers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelib.config import parse
from pipelib.errors import UserError, how_to_repair
from pipelib.files import read_json, write_atomic, write_json, write_text
from pipelib.model.gpt import GPT
from pipelib.model.params import ModelParams
from pipelib.model.vocabulary import EOT_TOKEN_ID, PADDED_VOCAB_SIZE, VOCAB_SIZE, vocabulary_file

_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_PREFIX = "transformer."
_DERIVED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias")
"""Tensors that older files carry and that follow from the others: the tied head, and causal masks."""
_GPT2: dict[str, tuple[object, ...]] = {
    "model_type": ("gpt2",),
    "vocab_size": (VOCAB_SIZE,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
"""What config.json must say where it says it; other values are other architectures under GPT-2's name."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def export_model(model: GPT, folder: Path, readme: str) -> None:
    """Write config, weights (fp32, without the vocabulary's padding), tokenizer, generation config and README.

    The bytes are a function of the weights and `readme` alone.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / WEIGHTS) as file:
        file.write(save(to_huggingface(model.state_dict()), metadata={"format": "pt"}))
    write_json(folder / CONFIG, _config(model.params))
    write_json(folder / "generation_config.json", {"bos_token_id": EOT_TOKEN_ID, "eos_token_id": EOT_TOKEN_ID})
    with write_atomic(folder / "vocab.json") as file:
        file.write(vocabulary_file("encoder.json").read_bytes())
    with write_atomic(folder / "merges.txt") as file:
        file.write(vocabulary_file("vocab.bpe").read_bytes())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "model_max_length": model.params.context_length,
            "add_prefix_space": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        },
    )
    write_text(folder / "README.md", readme)


def _config(params: ModelParams) -> dict[str, Any]:
    """config.json, in the order of OpenAI's."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": EOT_TOKEN_ID,
        "eos_token_id": EOT_TOKEN_ID,
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
        "vocab_size": VOCAB_SIZE,
    }


def to_huggingface(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under Hugging Face's names and in its layout, in fp32 on the CPU."""
    renamed = {}
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu", torch.float32)
        if name == "wte.weight":
            tensor = tensor[:VOCAB_SIZE]
        elif name.endswith(_TRANSPOSED):
            tensor = tensor.t()
        renamed[_PREFIX + name] = tensor.contiguous()
    return renamed


def import_model(folder: Path) -> GPT:
    """A GPT-2 from a Hugging Face folder, in fp32 on the CPU.

    Raises:
        UserError: files are missing or damaged, the model is no GPT-2, or its vocabulary is not GPT-2's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    params = read_params(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing, so there are no weights; only safetensors are read, never pickles.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so its weights cannot be trusted; {how_to_repair('models')}, or fetch it again."
        ) from None
    model = GPT(params)
    state = from_huggingface(tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        lines = ", ".join(
            f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'known')}" for name in wrong[:5]
        )
        raise UserError(
            f"{path} does not fit its {CONFIG} ({lines}), so the model would be wrong; "
            f"{how_to_repair('models')}, or fetch both again."
        )
    model.load_state_dict(state)
    return model.eval()


def read_params(folder: Path) -> ModelParams:
    """The shape of the model in a Hugging Face folder.

    Raises:
        UserError: it is not a GPT-2 with GPT-2's vocabulary.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder with a model; run dvc repro, or give another one with --model.")
    config = read_json(folder / CONFIG)
    for key in ("model_type", "vocab_size"):
        if key not in config:
            raise UserError(
                f"{folder / CONFIG} has no {key}, so nothing says that this is a GPT-2; use one as published."
            )
    for key, allowed in _GPT2.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{folder / CONFIG} has {key} = {config[key]!r} where GPT-2 has {allowed[0]!r}, so its logits would come "
                "out wrong; use a GPT-2 as published."
            )
    shape = {"context_length": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}
    problems: list[str] = []
    params = parse(ModelParams, {ours: config.get(theirs) for ours, theirs in shape.items()}, "", problems)
    if params is not None and config.get("n_inner") not in (None, 4 * params.n_embd):
        problems.append(f"n_inner is {config['n_inner']}, not 4 times n_embd.")
    if params is None or problems:
        raise UserError(f"{folder / CONFIG} does not describe a GPT-2: {' '.join(problems)}")
    return params


def from_huggingface(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names and in our layout, the vocabulary padded with zeros."""
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(_PREFIX)
        if name.endswith(_DERIVED):
            continue
        tensor = tensor.to(torch.float32)
        if name == "wte.weight" and len(tensor) == VOCAB_SIZE:
            tensor = torch.cat([tensor, tensor.new_zeros(PADDED_VOCAB_SIZE - VOCAB_SIZE, tensor.shape[1])])
        elif name.endswith(_TRANSPOSED):
            tensor = tensor.t().contiguous()
        state[name] = tensor
    return state


def readme(params: ModelParams, recipe: dict[str, object]) -> str:
    """The README of an exported model: a function of the stage's inputs, so that equal inputs give equal bytes."""
    rows = "\n".join(f"| {name} | {json.dumps(value)} |" for name, value in recipe.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [gpt2, pipelib]\n---\n\n"
        f"# GPT-2, {params.parameters:,} parameters\n\n"
        "Pretrained by pipelib. Load it with transformers:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("models")\n'
        'tokenizer = AutoTokenizer.from_pretrained("models")\n```\n\n'
        "Everything that decided these weights:\n\n"
        f"| what | value |\n|---|---|\n{rows}\n"
    )
