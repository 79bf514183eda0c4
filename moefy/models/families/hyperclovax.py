"""HyperCLOVA X: Granite with a multiplier in place of a divisor, and norms behind each sublayer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moefy.models.families import granite
from moefy.models.families.family import Config

if TYPE_CHECKING:
    from torch import Tensor


def join(layer: Any) -> Callable[[Tensor], Tensor]:
    """The FFN's output normed, if it is, times `residual_multiplier`."""
    norm, multiplier = layer.post_norm2, layer.residual_multiplier
    return lambda y_TD: norm(y_TD) * multiplier


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """Granite divides by what multiplies the logits here."""
    return {**config, "logits_scaling": 1 / config.get("logits_scaling", 1.0)}


def variant(config: Config) -> dict[str, Any]:
    """Without the norms it is Granite."""
    return {} if config.get("use_post_norm", True) else {"targets": granite.FAMILY.targets}


FAMILY = dataclasses.replace(
    granite.FAMILY,
    targets=(),
    missing_feature="norms before and behind attention and FFN",
    join=join,
    canonical=canonical,
    variant=variant,
)
