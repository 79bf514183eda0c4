"""Qwen 3: norms on the query and key heads, which only its own MoE sibling has."""

from __future__ import annotations

from moefy.families.family import Family

FAMILY = Family("qwen3", targets=("qwen3_moe",))
