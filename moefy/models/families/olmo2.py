"""OLMo 2: norms behind attention and FFN instead of before them, and on whole queries and keys."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("flex_olmo",), join=lambda layer: layer.post_feedforward_layernorm)
