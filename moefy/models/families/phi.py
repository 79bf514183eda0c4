"""Phi 1 and 2: an FFN without a gate beside the attention, and biases everywhere."""

from __future__ import annotations

from moefy.models.families.family import (
    Family,
    nothing_wrong,
    read_plain,
    shapes_plain,
    write_plain,
)

FAMILY = Family(
    "phi",
    missing_feature="an FFN with biases and without a gate",
    refuse=nothing_wrong,
    ffn=("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"),
    read=read_plain,
    write=write_plain,
    shapes=shapes_plain,
    down_bias="mlp.fc2.bias",
    gated=False,
)
