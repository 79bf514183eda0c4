"""Seed-OSS: Llama with biases on query, key and value, its heads together wider than the model."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe", "glm4_moe"))
