"""The dense class itself with a narrower FFN: how the static control is written."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Family
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def narrower(family: Family) -> Target:
    """The class of `family` as a target that routes nothing."""

    def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
        return family.resized(dense.config, shape.num_active)

    def tensors(split: Split) -> Tensors:
        tensors = family.write(split.part(split.partition.shared_S))
        return dict(zip(family.ffn, tensors, strict=True))

    return Target(
        "",
        configure,
        tensors,
        lambda shape: True,
        native=True,
        ties=True,
        model_type=family.model_type,
    )
