"""Ministral 8B: Mistral with a sliding window on some of the layers."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("ministral", targets=("qwen2_moe", "mixtral", "glm4_moe"), windows="some")
