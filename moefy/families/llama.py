"""Llama 2 and 3, SmolLM and SmolLM2, TinyLlama, Yi and others of the class."""

from __future__ import annotations

from typing import Any

from moefy.families.family import Family


def refuse(config: dict[str, Any]) -> str | None:
    """MoE classes have no biases in the FFN, and none at the attention's output."""
    if config.get("mlp_bias"):
        return "its FFN has biases (mlp_bias), which no stock MoE class can hold"
    if config.get("attention_bias"):
        return "its attention output has a bias (attention_bias), which qwen2_moe cannot hold"
    return None


FAMILY = Family("llama", targets=("qwen2_moe",), refuse=refuse)
