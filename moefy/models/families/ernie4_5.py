"""ERNIE 4.5: rotation of interleaved pairs, as in its MoE sibling."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Family


def refuse(config: dict[str, Any]) -> str | None:
    """Biases, which the class has on all matrices or none."""
    if config.get("use_bias"):
        return "its FFN has biases (use_bias), which no stock MoE class can hold"
    return None


FAMILY = Family("ernie4_5", targets=("ernie4_5_moe",), refuse=refuse)
