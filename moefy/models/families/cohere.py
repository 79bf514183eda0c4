"""Cohere (Command R, Aya): Cohere 2 without windows, rotating in every layer.

Its MoE sibling rotates in layers with a window only, so all get one, as long as the context.
"""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import FFN_BIASES, Family


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """A window on every layer that no text within the context reaches."""
    types = ["sliding_attention"] * config["num_hidden_layers"]
    window = config.get("max_position_embeddings", 8192)
    return {**config, "layer_types": types, "sliding_window": window}


FAMILY = Family(
    targets=("cohere2_moe",),
    refused={
        "mlp_bias": FFN_BIASES,
        "use_qk_norm": "it has norms on query and key heads, which cohere2_moe cannot hold",
    },
    canonical=canonical,
)
