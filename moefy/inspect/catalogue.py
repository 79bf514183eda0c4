"""The families, stock classes and engines that moefy knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moefy.models import families, targets
from moefy.models.engines import known_engines
from moefy.models.shape import any_shared, no_shared, one_shared, shared_multiple
from moefy.models.targets.target import Target
from moefy.types import Shape

SHARED: dict[Callable[[Shape], bool], str] = {
    no_shared: "none",
    one_shared: "as an expert",
    shared_multiple: "multiple of an expert",
    any_shared: "any width",
}
"""How wide a class's shared expert may be, by its `fits`."""


def catalogue() -> dict[str, Any]:
    """Every family with its targets, best first, and what each target can express."""
    known = {name: families.load(name) for name in families.names()}
    names = [*(name for name in targets.names() if name != targets.OWN), targets.OWN]
    return {
        "families": {
            name: {
                "targets": list(family.targets),
                "missing_feature": family.missing_feature or None,
            }
            for name, family in known.items()
        },
        "targets": {name: _expresses(targets.load(name)) for name in names},
    }


def _expresses(target: Target) -> dict[str, Any]:
    """What a target can hold, and where it runs."""
    return {
        "shared": SHARED[target.fits],
        "dense_layers": target.dense_layers,
        "selection_bias": target.selection_bias,
        "elastic": target.elastic,
        "copies": target.copies,
        "engines": known_engines(target.model_type),
    }
