"""StarCoder2: an FFN without a gate, and biases everywhere."""

from __future__ import annotations

from moefy.models.families.family import Config, Family


def refuse(config: Config) -> str | None:
    """An FFN without biases, which other models of the class have not."""
    return None if config.get("use_bias", True) else "it has no biases (use_bias), expected them"


FAMILY = Family(
    refused={},
    missing_feature="an FFN with biases and without a gate",
    refuse=refuse,
    ffn=("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"),
    down_bias="mlp.c_proj.bias",
    gated=False,
)
