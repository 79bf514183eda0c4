"""Llama 2 and 3, SmolLM and SmolLM2, TinyLlama, Yi and others of the class."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen2_moe", "glm4_moe", "mixtral", "granitemoeshared"))
