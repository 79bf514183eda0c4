"""OPT and Galactica: an FFN without a gate and without a module of its own, learned positions."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Config, Family


def variant(config: Config) -> dict[str, Any]:
    """OPT 350M norms what leaves a sublayer, not what enters it; Galactica has no biases."""
    changes: dict[str, Any] = {}
    if not config.get("do_layer_norm_before", True):
        changes["behind"] = "final_layer_norm"
    if not config.get("enable_bias", True):
        changes |= {"ffn": ("fc1.weight", "fc2.weight"), "down_bias": None}
    return changes


FAMILY = Family(
    refused={},
    missing_feature="an FFN with biases and without a gate",
    layer="model.decoder.layers.{layer}.",
    ffn=("fc1.weight", "fc1.bias", "fc2.weight"),
    down_bias="fc2.bias",
    gated=False,
    keys={"embedding_size": "word_embed_proj_dim"},
    width="ffn_dim",
    activation="activation_function",
    block="fc2",
    emptied=("fc1", "activation_fn"),
    embedding="model.decoder.embed_tokens.weight",
    positions="model.decoder.embed_positions.weight",
    first_position=2,
    projection="model.decoder.project_in.weight",
    variant=variant,
)
