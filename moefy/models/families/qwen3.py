"""Qwen 3: norms on the query and key heads, which few MoE classes have."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen3_moe", "glm4_moe"), windows="some")
