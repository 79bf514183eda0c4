"""Granite 4 dense: its family's MoE class with no experts, the FFN stored as a shared expert."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Family, read_fused, shapes_fused, write_fused
from moefy.models.families.granite import join


def refuse(config: dict[str, Any]) -> str | None:
    """Experts, and layers that are no attention."""
    if config.get("num_local_experts"):
        return "it is already a Mixture of Experts (num_local_experts)"
    types = set(config.get("layer_types") or ["mamba"])
    if types - {"attention", "full_attention"}:
        return f"some of its layers are no attention (layer_types: {', '.join(sorted(types))})"
    return None


FAMILY = Family(
    "granitemoehybrid",
    targets=("granitemoehybrid",),
    refuse=refuse,
    ffn=("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
    read=read_fused,
    write=write_fused,
    shapes=shapes_fused,
    width="shared_intermediate_size",
    block="shared_mlp",
    embedding_scale=lambda config: config["embedding_multiplier"],
    join=join,
)
