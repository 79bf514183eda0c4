"""Qwen 3.5 dense, its text part: a gated delta rule in place of most attentions."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("qwen3_5_moe_text",), gated_heads=True)
