"""Seed-OSS: Llama with biases on query, key and value, its heads together wider than the model."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("seed_oss", targets=("qwen2_moe", "glm4_moe"))
