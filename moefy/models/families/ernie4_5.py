"""ERNIE 4.5: rotation of interleaved pairs, as in its MoE sibling."""

from moefy.models.families.family import FFN_BIASES, Family

FAMILY = Family(targets=("ernie4_5_moe",), refused={"use_bias": FFN_BIASES})
