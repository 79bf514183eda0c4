"""Gemma 2: norms before and behind the FFN, capped scores and logits, which no MoE class has."""

from moefy.models.families.family import Family

FAMILY = Family(
    missing_feature="norms before and behind the FFN, and capped attention scores",
    activation="hidden_activation",
    embedding_scale=lambda config: config["hidden_size"] ** 0.5,
    join=lambda layer: layer.post_feedforward_layernorm,
)
