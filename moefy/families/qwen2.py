"""Qwen 2 and 2.5: llama with biases on q, k and v."""

from __future__ import annotations

from moefy.families.family import Family

FAMILY = Family("qwen2", targets=("qwen2_moe",))
