"""Granite 3: Llama with four multipliers, one of which scales what each layer adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moefy.models.families.family import Family

if TYPE_CHECKING:
    from torch import Tensor


def join(layer: Any) -> Callable[[Tensor], Tensor]:
    """The FFN's output times `residual_multiplier`."""
    multiplier = layer.residual_multiplier
    return lambda y_TD: y_TD * multiplier


FAMILY = Family(
    targets=("granitemoeshared", "granitemoehybrid"),
    embedding_scale=lambda config: config["embedding_multiplier"],
    join=join,
)
