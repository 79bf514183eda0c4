"""Cohere (Command R, Aya): Cohere 2 without windows, rotating in every layer.

Its MoE sibling rotates in layers with a window only, so all get one, as long as the context.
"""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Family, no_ffn_bias


def refuse(config: dict[str, Any]) -> str | None:
    """Norms on query and key heads."""
    if config.get("use_qk_norm"):
        return "it has norms on query and key heads (use_qk_norm), which cohere2_moe cannot hold"
    return no_ffn_bias(config)


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """A window on every layer that no text within the context reaches."""
    types = ["sliding_attention"] * config["num_hidden_layers"]
    window = config.get("max_position_embeddings", 8192)
    return {**config, "layer_types": types, "sliding_window": window}


FAMILY = Family("cohere", targets=("cohere2_moe",), refuse=refuse, canonical=canonical)
