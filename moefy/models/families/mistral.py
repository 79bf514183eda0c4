"""Mistral 7B and its like; a sliding window, where set, is kept on every layer."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe", "mixtral", "granitemoeshared", "glm4_moe"), windows="all")
