"""The network of llama, qwen3 and arcee: pre-norm blocks with RMSNorm, rotary positions and grouped queries, without biases.

Touvron et al., LLaMA, 2023 (https://arxiv.org/abs/2302.13971); rotary positions: Su et al., RoFormer, 2021; grouped queries:
Ainslie et al., 2023. It computes what Hugging Face's classes of the same names compute, and its tensors have their names. The
families differ in the MLP and in whether queries and keys are normed; see `families/`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelib.model.attend import Attend, causal
from pipelib.model.decoder import HEAD, INIT_STD, Decoder
from pipelib.model.params import ModelParams, family_params
from pipelib.model.rotary_params import RotaryParams
from pipelib.schema import parse
from pipelib.vocabulary.tokenizer import padded_size


class RMSNorm(nn.Module):
    """Divide by the root of the mean square, and scale (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of numbers (i, i + half) by the angle of its position: (B, heads, T, head_dim) -> the same."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def frequencies(params: RotaryParams) -> Tensor:
    """How far each pair of numbers turns from one position to the next, in radians, before it is slowed: (head_dim / 2,)."""
    return params.rope_theta ** -(torch.arange(0, params.head_dim, 2, dtype=torch.float32) / params.head_dim)


def slowing(params: RotaryParams) -> Tensor:
    """What `params.scaling` divides each of the `frequencies` by: 1 for fast pairs, `factor` for slow ones (head_dim / 2,).

    The formula of `rope_type: llama3` in transformers' `modeling_rope_utils.py`.
    """
    fast = frequencies(params)
    if (scaling := params.scaling) is None:
        return torch.ones_like(fast)
    turns = scaling.original_max_position_embeddings * fast / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / scaling.factor)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, params: RotaryParams) -> None:
        super().__init__()
        width, self.head_dim = params.hidden_size, params.head_dim
        queries, keys = params.num_attention_heads * self.head_dim, params.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        if params.norms_queries:
            self.q_norm = RMSNorm(self.head_dim, params.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, params.rms_norm_eps)
        self.norms_queries = params.norms_queries

    def forward(self, x: Tensor, layer: int, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        query, key, value = (self._heads(layer_of(x)) for layer_of in (self.q_proj, self.k_proj, self.v_proj))
        if self.norms_queries:
            query, key = self.q_norm(query), self.k_norm(key)
        attended = attend(layer, turn(query, cos, sin).to(value.dtype), turn(key, cos, sin).to(value.dtype), value)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class GatedMLP(nn.Module):
    """SwiGLU: an MLP with a gate (Shazeer, 2020)."""

    def __init__(self, params: RotaryParams) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(params.hidden_size, params.intermediate_size, bias=False)
        self.up_proj = nn.Linear(params.hidden_size, params.intermediate_size, bias=False)
        self.down_proj = nn.Linear(params.intermediate_size, params.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SquaredMLP(nn.Module):
    """An MLP without a gate, with the square of ReLU as its activation (So et al., Primer, 2021)."""

    def __init__(self, params: RotaryParams) -> None:
        super().__init__()
        self.up_proj = nn.Linear(params.hidden_size, params.intermediate_size, bias=False)
        self.down_proj = nn.Linear(params.intermediate_size, params.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        out: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return out


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, params: RotaryParams, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(params.hidden_size, params.rms_norm_eps)
        self.self_attn = Attention(params)
        self.post_attention_layernorm = RMSNorm(params.hidden_size, params.rms_norm_eps)
        self.mlp = mlp(params)

    def forward(self, x: Tensor, layer: int, attend: Attend, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), layer, attend, cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class RotaryDecoder(Decoder):
    """The network. Its tensors have Hugging Face's names."""

    mlp: ClassVar[type[nn.Module]] = GatedMLP
    activation: ClassVar[str] = "silu"
    """Hugging Face's name for the activation of the MLP."""
    class_name: ClassVar[str]
    """The class of transformers that loads an exported model."""
    embedding_names: tuple[str, ...] = ("embed_tokens.weight",)
    projection_names = ("o_proj.weight", "down_proj.weight")
    params: RotaryParams

    def __init__(self, params: RotaryParams, vocab_size: int) -> None:
        super().__init__(params, vocab_size)
        rows = padded_size(vocab_size)
        self.embed_tokens = nn.Embedding(rows, params.hidden_size)
        self.layers = nn.ModuleList(Block(params, self.mlp) for _ in range(params.num_hidden_layers))
        self.norm = RMSNorm(params.hidden_size, params.rms_norm_eps)
        if not params.tie_word_embeddings:
            self.lm_head = nn.Linear(params.hidden_size, rows, bias=False)
            self.embedding_names = (*self.embedding_names, HEAD)
        self.register_buffer("frequencies", frequencies(params) / slowing(params), persistent=False)

    def hidden(self, inputs: Tensor, positions: Tensor | None = None, attend: Attend = causal) -> Tensor:
        """See `Decoder.hidden`."""
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=inputs.device)
        angles = positions[..., None].float() * self.get_buffer("frequencies")  # (T, head_dim / 2), or with B before
        angles = angles[..., None, :, :]  # the same for all heads
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(inputs)
        if self.bf16_residual:
            x = x.bfloat16()
        for layer, block in enumerate(self.layers):
            x = self.run(block, x, layer, attend, cos, sin)
        out: Tensor = self.norm(x)
        return out

    @property
    def head(self) -> Tensor:
        """The token embedding if it is tied."""
        return self.embed_tokens.weight if self.params.tie_word_embeddings else self.lm_head.weight

    def initial_std(self, name: str) -> float:
        """0.02. Projections into the residual stream are scaled by (2·layers)^-0.5, since 2·layers of them add up."""
        into_stream = name.endswith(self.projection_names)
        return INIT_STD * (2 * self.params.num_hidden_layers) ** -0.5 if into_stream else INIT_STD

    # ---- Hugging Face's form -----------------------------------------------------------------------------------------

    name_prefix = "model."
    derived_names = (HEAD, "rotary_emb.inv_freq")
    block_list = ("layers", "num_hidden_layers")
    config_settings: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "attention_dropout": (0.0,),
        "use_sliding_window": (False,),
        "pretraining_tp": (1,),
        "partial_rotary_factor": (1.0,),
        "final_logit_softcapping": (None,),
        "quantization_config": (None,),
    }

    @classmethod
    def config(cls, params: ModelParams, vocab_size: int, end_token_id: int) -> dict[str, Any]:
        """See `Decoder.config`."""
        assert isinstance(params, RotaryParams)
        scaling = {"rope_type": "llama3", **asdict(params.scaling)} if params.scaling else None
        return {
            "architectures": [cls.class_name],
            "model_type": cls.architecture,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": end_token_id,
            "eos_token_id": end_token_id,
            "head_dim": params.head_dim,
            "hidden_act": cls.activation,
            "hidden_size": params.hidden_size,
            "initializer_range": INIT_STD,
            "intermediate_size": params.intermediate_size,
            "max_position_embeddings": params.context_length,
            "mlp_bias": False,
            "num_attention_heads": params.num_attention_heads,
            "num_hidden_layers": params.num_hidden_layers,
            "num_key_value_heads": params.num_key_value_heads,
            "rms_norm_eps": params.rms_norm_eps,
            "rope_parameters": {"rope_theta": params.rope_theta, **(scaling or {"rope_type": "default"})},
            # the same for readers older than transformers 5
            "rope_theta": params.rope_theta,
            **({"rope_scaling": scaling} if scaling else {}),
            "tie_word_embeddings": params.tie_word_embeddings,
            "dtype": "float32",
            "vocab_size": vocab_size,
        }

    @classmethod
    def params_of(cls, config: Mapping[str, Any], problems: list[str]) -> ModelParams | None:
        """See `Decoder.params_of`."""
        heads, width = config.get("num_attention_heads"), config.get("hidden_size")
        per_head = width // heads if isinstance(heads, int) and isinstance(width, int) and heads > 0 else None
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        values = {
            "hidden_size": width,
            "intermediate_size": config.get("intermediate_size"),
            "num_hidden_layers": config.get("num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads", heads),
            "head_dim": config.get("head_dim") or per_head,
            "context_length": config.get("max_position_embeddings"),
            "rope_theta": _float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            **cls._scaling(rope, problems),
        }
        if config.get("hidden_act", cls.activation) != cls.activation:
            problems.append(f"hidden_act is {config['hidden_act']!r}, and {cls.activation!r} is computed here.")
        if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
            problems.append("layer_types has layers without full attention.")
        found: list[str] = []
        params: ModelParams | None = parse(
            family_params(cls.architecture), {**values, "architecture": cls.architecture}, "", found
        )
        problems += [line.replace("context_length", "max_position_embeddings") for line in found]
        return params

    @classmethod
    def _scaling(cls, rope: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """The key `rope_scaling` of the families that have it; `rope` is a mapping of config.json."""
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = (
            ("default", "llama3")
            if "rope_scaling" in family_params(cls.architecture).__dataclass_fields__
            else ("default",)
        )
        if kind not in known:
            problems.append(f"rope_type is {kind!r}, and only {' and '.join(known)} is computed here.")
        if kind not in known or len(known) == 1:
            return {}
        scaling = {key: _float(value) for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
        return {"rope_scaling": None if kind == "default" else scaling}

    @classmethod
    def outer_shapes(cls, params: ModelParams, rows: int) -> dict[str, tuple[int, ...]]:
        """The embedding."""
        assert isinstance(params, RotaryParams)
        return {"embed_tokens.weight": (rows, params.hidden_size)}

    def derived_problem(self, name: str, tensor: Tensor) -> str:
        """See `Decoder.derived_problem`. Older files keep the frequencies of the rotary positions."""
        if name == HEAD:
            return super().derived_problem(name, tensor)
        own = self.get_buffer("frequencies")
        if tensor.shape == own.shape and torch.allclose(tensor.float(), own, rtol=1e-4):
            return ""
        return "has other frequencies than rope_theta gives, so its positions differ; use a model as published."


def _float(value: object) -> object:
    """config.json may hold 10000 where a float is meant."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
