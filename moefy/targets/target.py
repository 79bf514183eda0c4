"""What moefy needs to know of a stock MoE class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.layout import FFN, Partition, Shape

ROUTER_SCALE = 2.0**-10
"""Router rows are written this small, so that every softmax gate is 1 / E to about 0.1 %."""


@dataclass(frozen=True)
class Target:
    """How a split FFN is written as a stock MoE class."""

    model_type: str
    configure: Callable[[dict[str, Any], Shape, list[int]], dict[str, Any]]
    """(dense configuration, shape, layers left dense) -> configuration of the MoE class."""
    tensors: Callable[[FFN, Partition, Tensor, int, torch.dtype], dict[str, Tensor]]
    """(ffn, partition, router rows, experts per token, dtype) -> the MoE block's tensors, by the
    name behind the layer's prefix."""
    has_shared: bool
    elastic: bool
    """Whether the gate of a chosen expert is independent of how many are chosen."""
    engines: tuple[str, ...]
    attention_biases: bool = False
    """Engines create q, k and v biases unconditionally, so zeros are written where none are."""


def copied(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a dense configuration that llama-like MoE classes share."""
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range "
        "rms_norm_eps use_cache attention_dropout pad_token_id bos_token_id eos_token_id "
        "rope_parameters"
    ).split()
    kept = {key: config[key] for key in keys if config.get(key) is not None}
    rope = config.get("rope_parameters") or {}
    # Loaders older than transformers 5, and other engines, read only these two.
    kept["rope_theta"] = rope.get("rope_theta", 10000.0)
    scaled = rope.get("rope_type", "default") != "default"
    kept["rope_scaling"] = (
        {key: value for key, value in rope.items() if key != "rope_theta"} if scaled else None
    )
    return kept


def sliding(config: dict[str, Any]) -> dict[str, Any]:
    """Sliding-window keys of the Qwen classes; layer types as the dense model has them."""
    window = config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * config["num_hidden_layers"]
    used = bool(window) and "sliding_attention" in types
    return {
        "use_sliding_window": used,
        "sliding_window": window if used else None,
        "max_window_layers": config["num_hidden_layers"] if used else 0,
        "layer_types": list(types),
    }


def expert_tensors(
    ffn: FFN, partition: Partition, gate: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The routed experts as per-expert linear layers, their `down_proj` divided by `gate`."""
    tensors = {}
    for expert, neurons in enumerate(partition.experts_EN):
        prefix = f"mlp.experts.{expert}."
        tensors[prefix + "gate_proj.weight"] = ffn.gate_FD[neurons].to(dtype)
        tensors[prefix + "up_proj.weight"] = ffn.up_FD[neurons].to(dtype)
        tensors[prefix + "down_proj.weight"] = (ffn.down_DF[:, neurons] / gate).to(dtype)
    return tensors


def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` as `dtype` holds it: what a gate computed in that precision really is."""
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype))
