"""Qwen 3.5 dense, its text part: a gated delta rule in place of most attentions."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("qwen3_5_text", targets=("qwen3_5_moe_text",), gated_heads=True)
