"""LoRA: small matrices beside the linear layers of a frozen model (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

A layer's output x·Wᵀ becomes x·Wᵀ + (alpha / rank)·x·Aᵀ·Bᵀ. A is random and B is zero at first, so that nothing changes before
the first step. The forward pass of a family knows nothing of it: a hook adds the second term. The files are those of PEFT.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipelib.errors import UserError
from pipelib.files import read_json, write_atomic, write_json
from pipelib.model.decoder import Decoder
from pipelib.model.huggingface import import_model
from pipelib.model.weights import weights_sha256
from pipelib.vocabulary.tokenizer import Tokenizer

ADAPTER = "adapter"
"""The name of the module in its model."""
CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "base.json"
"""PEFT's files, and ours: which weights the adapter belongs to."""


class Adapter(nn.Module):
    """The small matrices of all adapted layers."""

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, alpha: float, targets: Sequence[str]) -> None:
        """Args:
        targets: ends of the layers' names.
        """
        super().__init__()
        self._hooks: list[RemovableHandle] = []
        self.rank, self.alpha, self.scale, self.targets = rank, alpha, alpha / rank, list(targets)
        self.layers = dict(layers)
        """The adapted layers of the model by name; they are no part of this module."""
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        for name, layer in layers.items():
            key = name.replace(".", "/")  # a name of a parameter has no dots
            self.lora_A[key] = nn.Parameter(layer.weight.new_zeros(rank, layer.in_features))
            self.lora_B[key] = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) of a layer."""
        key = name.replace(".", "/")
        return self.lora_A[key], self.lora_B[key]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw A as PEFT does, uniform within 1 / sqrt(in), on the CPU and in the order of the layers; B is zero."""
        generator = torch.Generator().manual_seed(seed)
        for name in self.layers:
            first, second = self.matrices(name)
            drawn = torch.rand(first.shape, generator=generator) * 2 - 1
            first.copy_(drawn / math.sqrt(first.shape[1]))
            second.zero_()

    def attach(self) -> None:
        """Add the second term to the output of every adapted layer, from now on."""
        self._hooks = [
            layer.register_forward_hook(_Addition(*self.matrices(name), self.scale))
            for name, layer in self.layers.items()
        ]

    @torch.no_grad()
    def merge(self) -> None:
        """Add the product to the weights of the layers, once and for all, and detach."""
        for name, layer in self.layers.items():
            first, second = self.matrices(name)
            layer.weight += (self.scale * (second.double() @ first.double())).to(layer.weight.dtype)
        for hook in self._hooks:
            hook.remove()


class _Addition:
    """The hook of one layer."""

    def __init__(self, first: Tensor, second: Tensor, scale: float) -> None:
        self._first, self._second, self._scale = first, second, scale

    def __call__(self, _: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> Tensor:
        narrow = nn.functional.linear(inputs[0], self._first)
        return output + self._scale * nn.functional.linear(narrow, self._second)


def add_adapter(model: Decoder, rank: int, alpha: float, targets: Sequence[str] | str, seed: int) -> Adapter:
    """Freeze a model, and attach a new adapter to it as the module `adapter`.

    Args:
        targets: ends of the names of layers, such as q_proj or self_attn.q_proj, or `all` for the linear layers of the blocks.
        seed: for the matrices A.

    Raises:
        UserError: a target matches no layer, or the rank is larger than a layer.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not model.head
    }
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers}) if targets == "all" else list(targets)
    chosen = {name: layer for name, layer in layers.items() if any(f".{name}".endswith(f".{end}") for end in ends)}
    if unknown := [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in chosen)]:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
        raise UserError(
            f"finetune.adapter.targets: {', '.join(unknown)} matches no linear layer of {model.params.title}, so nothing there "
            f"would be trained; choose from {known}."
        )
    smallest = min(min(layer.weight.shape) for layer in chosen.values())
    if rank > smallest:
        raise UserError(
            f"finetune.adapter.rank: {rank} is larger than the smaller dimension of one of the chosen layers ({smallest}), "
            f"so its adapter would be larger than the layer; use {smallest} or less."
        )
    model.requires_grad_(False)
    adapter = Adapter(chosen, rank, alpha, ends)
    adapter.initialise(seed)
    adapter.attach()
    model.add_module(ADAPTER, adapter)
    return adapter


def adapter_of(model: Decoder) -> Adapter:
    """The adapter of a model that has one."""
    adapter = model.get_submodule(ADAPTER)
    assert isinstance(adapter, Adapter)
    return adapter


def export_adapter(model: Decoder, folder: Path, base: Mapping[str, Any]) -> None:
    """Write the adapter of a model as PEFT does.

    Args:
        base: what names the model that it belongs to: the path of its folder, and the hash of its weights.
    """
    from safetensors.torch import save

    adapter = adapter_of(model)
    tensors = {}
    for name in adapter.layers:
        for part, matrix in zip(("lora_A", "lora_B"), adapter.matrices(name), strict=True):
            tensors[f"{PEFT_PREFIX}{model.name_prefix}{name}.{part}.weight"] = matrix.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomic(folder / WEIGHTS) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    transposed = any(f"{name}.weight".endswith(model.transposed_names) for name in adapter.layers)
    write_json(folder / ORIGIN, base)
    write_json(
        folder / CONFIG,
        {
            "base_model_name_or_path": base["path"],
            "bias": "none",
            "fan_in_fan_out": transposed,
            "inference_mode": True,
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": adapter.rank,
            "target_modules": adapter.targets,
            "task_type": "CAUSAL_LM",
        },
    )


def merged(model: Decoder) -> Decoder:
    """Merge the adapter into a model, and remove it."""
    adapter_of(model).merge()
    delattr(model, ADAPTER)
    return model


# ---- Reading ---------------------------------------------------------------------------------------------------------

PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of tensor names, before Hugging Face's."""
UNLIKE_OURS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices")
"""Settings of PEFT that change what is computed; empty or false in an adapter that can be read here."""


def import_adapted(folder: Path, tokenizer: Tokenizer, adapter: Path | None) -> Decoder:
    """Read a model, and merge an adapter into it if one is given.

    Raises:
        UserError: the model cannot be read, or the adapter belongs to another one.
    """
    model = import_model(folder, tokenizer)
    return model if adapter is None else with_adapter(model, adapter, weights_sha256(folder), folder)


def with_adapter(model: Decoder, folder: Path, base_sha256: str, base: Path) -> Decoder:
    """Merge the adapter in a folder, as PEFT writes it, into a model.

    Args:
        base_sha256: the hash of the model's weights.
        base: the model's folder, for messages.

    Raises:
        UserError: there is no such adapter, it belongs to other weights, or it does something that cannot be done here.
    """
    from safetensors.torch import load

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} does not exist, so there is no adapter; name a folder with one (finetune.adapter makes one)."
            )
    config = read_json(folder / CONFIG)
    origin = read_json(folder / ORIGIN).get("sha256") if (folder / ORIGIN).is_file() else None
    if origin not in (None, base_sha256):
        raise UserError(
            f"{folder} was trained on weights with SHA-256 {str(origin)[:16]}, and {base} has {base_sha256[:16]}, so together "
            f"they would write nonsense; use its own base, {config.get('base_model_name_or_path')}, as it was then."
        )
    unlike = [key for key in UNLIKE_OURS if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unlike:
        what = ", ".join(unlike) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(
            f"{folder / CONFIG} has {what}, which pipelib does not support, so this adapter cannot be loaded; merge it into its "
            "base model with PEFT, and use the merged model."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tensors = load((folder / WEIGHTS).read_bytes())
    names = {_layer_of(name, model) for name in tensors}
    if unknown := sorted(names - layers.keys()):
        raise UserError(
            f"{folder / WEIGHTS} adapts {', '.join(unknown[:3])}, which {model.params.title} does not have as a linear layer, so "
            f"it belongs to another model than {base}; use its own base."
        )
    adapter = Adapter({name: layers[name] for name in sorted(names)}, int(config["r"]), float(config["lora_alpha"]), ())
    for name in sorted(names):
        for part, ours in zip(("lora_A", "lora_B"), adapter.matrices(name), strict=True):
            theirs = tensors.get(f"{PEFT_PREFIX}{model.name_prefix}{name}.{part}.weight")
            if theirs is None or theirs.shape != ours.shape:
                shape = "missing" if theirs is None else tuple(theirs.shape)
                raise UserError(
                    f"{folder / WEIGHTS}: {part} of {name} is {shape}, not {tuple(ours.shape)}, so the adapter does not fit "
                    f"{base}; use its own base."
                )
            ours.data.copy_(theirs)
    adapter.merge()
    return model


def _layer_of(name: str, model: Decoder) -> str:
    """Our name of the layer that a tensor of PEFT adapts."""
    return name.removeprefix(PEFT_PREFIX).removeprefix(model.name_prefix).rsplit(".lora_", 1)[0]
