"""Arcee (AFM): Llama with a squared ReLU in place of the gate."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Config, Family


def variant(config: Config) -> dict[str, Any]:
    """Biases, where there are any."""
    if not config.get("mlp_bias"):
        return {}
    names = ("mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight")
    return {"ffn": names, "down_bias": "mlp.down_proj.bias"}


FAMILY = Family(
    missing_feature="an FFN without a gate",
    refused={},
    ffn=("mlp.up_proj.weight", "mlp.down_proj.weight"),
    gated=False,
    variant=variant,
)
