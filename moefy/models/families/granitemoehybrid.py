"""Granite 4 dense: its family's MoE class with no experts, the FFN stored as a shared expert."""

from __future__ import annotations

from moefy.models.families.family import Config, Family
from moefy.models.families.granite import join


def refuse(config: Config) -> str | None:
    """Layers that are no attention."""
    types = set(config.get("layer_types") or ["mamba"])
    if types - {"attention", "full_attention"}:
        return f"some of its layers are no attention (layer_types: {', '.join(sorted(types))})"
    return None


FAMILY = Family(
    targets=("granitemoehybrid",),
    refused={"num_local_experts": "it is already a Mixture of Experts"},
    refuse=refuse,
    ffn=("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
    width="shared_intermediate_size",
    block="shared_mlp",
    embedding_scale=lambda config: config["embedding_multiplier"],
    tells_positions=False,
    join=join,
)
