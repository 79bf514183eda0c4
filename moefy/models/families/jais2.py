"""Jais 2: a squared ReLU in place of the gate, and biases everywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.models.families import arcee
from moefy.models.families.family import Config


def variant(config: Config) -> dict[str, Any]:
    """Biases, unless the configuration says that there are none."""
    return arcee.variant({"mlp_bias": config.get("mlp_bias", True)})


FAMILY = dataclasses.replace(arcee.FAMILY, variant=variant)
