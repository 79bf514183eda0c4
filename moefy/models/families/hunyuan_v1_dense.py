"""Hunyuan dense: norms on query and key heads behind the rotation, as in its MoE sibling."""

from __future__ import annotations

from moefy.models.families.family import Family

FAMILY = Family("hunyuan_v1_dense", targets=("hunyuan_v1_moe",))
