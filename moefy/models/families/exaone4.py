"""EXAONE 4: norms on heads, and behind attention and FFN instead of before them."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family(
    "exaone4",
    missing_feature="norms on heads together with norms behind attention and FFN",
    join=lambda layer: layer.post_feedforward_layernorm,
)
