"""What moefy knows: the families, the stock classes, and the engines that know those."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moefy.models import families, targets
from moefy.models.engines import known_engines
from moefy.models.families.family import Family
from moefy.models.targets.target import Dense, Target
from moefy.types import Shape

SPECIMEN = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "vocab_size": 100,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
"""The configuration of a model that every class can hold."""

LEFT = {"first": (0, 1), "last": (4,), "between": (2,)}
"""Layers of the specimen that are left dense."""


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
        "targets": {name: _expresses(*_loaded(name, known.values())) for name in names},
    }


def _loaded(name: str, known: Iterable[Family]) -> tuple[Target, Family]:
    """A target, and a family that it can hold."""
    family = next(family for family in known if name in (*family.targets, targets.OWN))
    return targets.load(name, family), family


def _expresses(target: Target, family: Family) -> dict[str, Any]:
    """What a target can hold, and where it runs."""
    return {
        "shared": shared_expert(target),
        "dense_layers": dense_layers(target, family),
        "selection_bias": target.selection_bias,
        "elastic": target.elastic,
        "engines": known_engines(target.model_type),
    }


def shared_expert(target: Target) -> str:
    """How wide a class's shared expert may be."""
    if target.fits(Shape(100, 20, 8, 10, 2)):
        return "any width" if target.fits(Shape(100, 28, 8, 9, 2)) else "multiple of an expert"
    return "as an expert" if target.fits(Shape(90, 10, 8, 10, 2)) else "none"


def dense_layers(target: Target, family: Family) -> str:
    """Which layers of a model may stay dense in a class."""
    config = {"model_type": family.model_type, **SPECIMEN}
    held = [
        place
        for place, left in LEFT.items()
        if target.why_unsupported(Dense(family, config, left_dense=left)) is None
    ]
    return "any" if len(held) == len(LEFT) else " and ".join(held) or "none"
