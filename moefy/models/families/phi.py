"""Phi 1 and 2: an FFN without a gate beside the attention, and biases everywhere."""

from moefy.models.families.family import Family

FAMILY = Family(
    refused={},
    missing_feature="an FFN with biases and without a gate",
    ffn=("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"),
    down_bias="mlp.fc2.bias",
    gated=False,
)
