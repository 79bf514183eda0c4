"""The dense class itself with a narrower FFN: how the static control is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.families.family import Family
from moefy.layout import FFN, Partition, Shape
from moefy.targets.target import Dense, Target


def narrower(family: Family) -> Target:
    """The class of `family` as a target that routes nothing."""

    def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
        return family.resized(dense.config, shape.num_active)

    def tensors(
        ffn: FFN, partition: Partition, router_ED: Tensor, k: int, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        kept = family.write(ffn.some(partition.shared_S, dtype))
        return dict(zip(family.ffn, kept, strict=True))

    return Target(
        family.model_type,
        configure,
        tensors,
        lambda shape: True,
        elastic=False,
        engines=("every engine",),
        native=True,
        ties=True,
    )
