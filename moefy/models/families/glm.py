"""GLM-4 9B: biases on query, key and value, neighbours in a half of each head rotated together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moefy.models.families import phi3
from moefy.models.families.family import Config, Family
from moefy.models.families.helium import halved

if TYPE_CHECKING:
    from torch import Tensor


def share(config: Config) -> float:
    """How much of a head is rotated; half, if the configuration does not say."""
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    return float(share or 0.5)


def rest(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Rows of queries and keys reordered, gate and up of a layer that stays dense as two."""
    return phi3.rest(config, name, halved(config, name, tensor, share(config)))


def canonical(config: dict) -> dict:
    """The configuration with the rotated share, for classes with another default."""
    rope = {**(config.get("rope_parameters") or {}), "partial_rotary_factor": share(config)}
    return {**config, "rope_parameters": rope}


FAMILY = Family(
    targets=("glm4_moe",),
    ffn=phi3.FAMILY.ffn,
    rest=rest,
    canonical=canonical,
    partial_rotary=True,
)
