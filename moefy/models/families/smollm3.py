"""SmolLM3: Llama that rotates no queries and keys in every fourth layer.

No stock MoE class rotates in some layers only without changing more. GLM-4-MoE rotates a part of
each head: with heads twice as wide, half of them rotated, layers that rotate stand in the one half
and the others in the other. Exact, for twice the key-value cache.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from moefy.models.families.family import FFN_BIASES, Config, Family

if TYPE_CHECKING:
    from torch import Tensor


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """Heads twice as wide, half of each rotated."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = {**config["rope_parameters"], "partial_rotary_factor": 0.5}
    return {**config, "head_dim": 2 * width, "rope_parameters": rope}


def rest(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Queries, keys and values with as many zeros in each head, outputs that ignore those.

    Scores are divided by sqrt(2 d) instead of sqrt(d), hence queries times sqrt(2): in bfloat16
    this rounds them once more.
    """
    import torch

    match = re.search(r"layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight$", name)
    if not match:
        return {name: tensor}
    layer, part = int(match[1]), match[2]
    heads = config["num_attention_heads"]
    if part in "kv":
        heads = config.get("num_key_value_heads") or heads
    matrix = tensor.T if part == "o" else tensor
    head_HND = matrix.unflatten(0, (heads, -1))
    if part == "q":
        head_HND = head_HND.float() * 2**0.5
    zeros_HND = torch.zeros_like(head_HND)
    first = part in "vo" or rotates(config, layer)
    pair = [head_HND, zeros_HND] if first else [zeros_HND, head_HND]
    padded = torch.cat(pair, 1).flatten(0, 1)
    return {name: padded.T if part == "o" else padded}


def rotates(config: Config, layer: int) -> bool:
    """Whether a layer rotates its queries and keys."""
    listed = config.get("no_rope_layers")
    if listed is not None:
        return bool(listed[layer])
    return (layer + 1) % int(config.get("no_rope_layer_interval", 4)) != 0


FAMILY = Family(
    targets=("glm4_moe",),
    refused={
        "mlp_bias": FFN_BIASES,
        "attention_bias": "its attention has biases, which glm4_moe cannot hold",
    },
    rest=rest,
    canonical=canonical,
    windows="some",
    partial_rotary=True,
)
