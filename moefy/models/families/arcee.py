"""Arcee (AFM): Llama with a squared ReLU in place of the gate."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import (
    Config,
    Family,
    nothing_wrong,
    read_plain,
    shapes_bare,
    shapes_plain,
    write_plain,
)


def variant(config: Config) -> dict[str, Any]:
    """Biases, where there are any."""
    if not config.get("mlp_bias"):
        return {}
    names = ("mlp.up_proj.weight", "mlp.up_proj.bias", "mlp.down_proj.weight")
    return {"ffn": names, "shapes": shapes_plain, "down_bias": "mlp.down_proj.bias"}


FAMILY = Family(
    "arcee",
    missing_feature="an FFN without a gate",
    refuse=nothing_wrong,
    ffn=("mlp.up_proj.weight", "mlp.down_proj.weight"),
    read=read_plain,
    write=write_plain,
    shapes=shapes_bare,
    gated=False,
    variant=variant,
)
