"""EXAONE 4: norms on heads, and behind attention and FFN instead of before them."""

from moefy.models.families.family import Family

FAMILY = Family(
    missing_feature="norms on heads together with norms behind attention and FFN",
    join=lambda layer: layer.post_feedforward_layernorm,
)
