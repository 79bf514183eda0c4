"""Ministral 3: Mistral whose queries grow with their position."""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.models.families import mistral
from moefy.models.families.family import Config


def variant(config: Config) -> dict[str, Any]:
    """Without that growth it is Mistral."""
    rope = config.get("rope_parameters") or {}
    held = rope.get("llama_4_scaling_beta") == 0
    return {"targets": mistral.FAMILY.targets} if held else {}


FAMILY = dataclasses.replace(
    mistral.FAMILY,
    targets=(),
    missing_feature="queries that grow with their position (llama_4_scaling_beta)",
    variant=variant,
)
