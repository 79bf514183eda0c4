"""Qwen 2 and 2.5: biases on query, key and value."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe", "granitemoeshared", "glm4_moe"), windows="some")
