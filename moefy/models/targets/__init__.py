"""Stock MoE classes: one file per `model_type`, holding one value `TARGET`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

from moefy.models.families.family import Family
from moefy.models.families.llama import FAMILY
from moefy.models.targets.target import Target

OWN = "moefy"
"""The class that is not stock: it holds every family, and runs in transformers only."""


def names() -> list[str]:
    """The stock MoE classes that can be written, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name not in ("target", "dense"))


def load(model_type: str, family: Family = FAMILY) -> Target:
    """The target of a MoE `model_type`, which must be one of `names()`, for a dense family."""
    module = importlib.import_module(f"moefy.models.targets.{model_type}")
    target = module.TARGET if hasattr(module, "TARGET") else module.target(family)
    return dataclasses.replace(target, model_type=model_type)
