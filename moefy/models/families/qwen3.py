"""Qwen 3: norms on the query and key heads, which few MoE classes have."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("qwen3", targets=("qwen3_moe", "glm4_moe"), windows="some")
