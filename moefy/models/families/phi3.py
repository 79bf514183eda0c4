"""Phi 3 and 4: query, key and value stored as one matrix, gate and up as another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moefy.models.families.family import Config, Family

if TYPE_CHECKING:
    from torch import Tensor


def rest(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Query, key and value as three matrices, and gate and up of a layer that stays dense."""
    prefix, fused, _ = name.partition("self_attn.qkv_proj.")
    if fused:
        heads = config["num_attention_heads"]
        groups = config.get("num_key_value_heads") or heads
        width = len(tensor) // (heads + 2 * groups)
        parts = tensor.split([heads * width, groups * width, groups * width])
        return {
            f"{prefix}self_attn.{part}_proj.weight": matrix
            for part, matrix in zip("qkv", parts, strict=True)
        }
    prefix, fused, _ = name.partition("mlp.gate_up_proj.")
    if fused:
        gate, up = tensor.chunk(2)
        return {prefix + "mlp.gate_proj.weight": gate, prefix + "mlp.up_proj.weight": up}
    return {name: tensor}


FAMILY = Family(
    targets=("glm4_moe", "mixtral", "qwen2_moe"),
    ffn=("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
    rest=rest,
    windows="all",
    partial_rotary=True,
)
