"""Hunyuan dense: norms on query and key heads behind the rotation, as in its MoE sibling."""

from moefy.models.families.family import Family

FAMILY = Family(targets=("hunyuan_v1_moe",))
