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

from pipelib.errors import UserError
from pipelib.files import write_atomic, write_json
from pipelib.model.decoder import Decoder

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
            f"would be trained; it has {known}."
        )
    smallest = min(min(layer.weight.shape) for layer in chosen.values())
    if rank > smallest:
        raise UserError(
            f"finetune.adapter.rank: {rank} is more than the smallest adapted layer has ({smallest}), so an adapter would be "
            "larger than the layer; lower it."
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
            tensors[f"base_model.model.{model.name_prefix}{name}.{part}.weight"] = matrix.detach().cpu().contiguous()
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
