"""Dense families: one file per `model_type`, holding one value `FAMILY`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil

from moefy.models.families.family import Config, Family


def names() -> list[str]:
    """The `model_type`s that can be converted, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in modules if name != "family")


def load(model_type: str, config: Config | None = None) -> Family:
    """The family of a dense `model_type`, one of `names()`, as models of `config` have it."""
    family: Family = importlib.import_module(f"moefy.models.families.{model_type}").FAMILY
    return dataclasses.replace(family, model_type=model_type, **family.variant(config or {}))
