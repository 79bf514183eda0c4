"""Ministral 8B: Mistral with a sliding window on some of the layers."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe", "glm4_moe", "mixtral"), windows="some")
