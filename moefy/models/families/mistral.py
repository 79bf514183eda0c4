"""Mistral 7B and its like; a sliding window, where set, is kept on every layer."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe", "glm4_moe", "mixtral", "granitemoeshared"), windows="all")
