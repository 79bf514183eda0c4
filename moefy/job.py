"""What a conversion will be, settled from headers and configuration before a weight is read."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moefy import families, targets
from moefy.block import Method
from moefy.checkpoint import DTYPES, Checkpoint
from moefy.errors import MoefyError
from moefy.families.family import Family
from moefy.layout import Shape
from moefy.recipe import Recipe, chosen_layers, nearest
from moefy.shape import pruned, solve
from moefy.source import resolve
from moefy.targets.target import Target
from moefy.validate import check_target, check_tensors, open_checkpoint

Watch = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Job:
    """A conversion whose every question has been answered, before a weight is read."""

    recipe: Recipe
    checkpoint: Checkpoint
    family: Family
    target: Target
    shape: Shape
    layers: list[int]
    method: Method
    notes: tuple[str, ...]

    def size(self, key: str) -> int:
        """A whole number of the dense configuration, which validation has checked."""
        return int(self.checkpoint.config[key])  # pyright: ignore[reportArgumentType]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.size("num_hidden_layers")

    @property
    def dtype(self) -> torch.dtype:
        """Of the FFN and router tensors that are written."""
        if self.recipe.dtype != "as-stored":
            return getattr(torch, self.recipe.dtype)
        return DTYPES[self.checkpoint.entries[self.family.ffn_names(self.layers[0])[2]].dtype]

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        name = self.recipe.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)


def prepare(recipe: Recipe, *, control: bool = False) -> Job:
    """Answer from headers and configuration alone whether and how `recipe` can be run.

    `control` admits the oracle router, which evaluation uses and which cannot be written.

    Raises:
        MoefyError: code 2 for options that cannot be, 3 for a broken and 4 for an unsupported
            checkpoint, 5 for a device that is not there.
    """
    method = _method(recipe, control)
    _check_device(recipe.device)
    checkpoint = open_checkpoint(resolve(recipe.model, revision=recipe.revision))
    family = families.load(str(checkpoint.config["model_type"]))
    target = _target(recipe, family)
    num_layers, neurons = (
        int(checkpoint.config[key])  # pyright: ignore[reportArgumentType]
        for key in ("num_hidden_layers", "intermediate_size")
    )
    layers = chosen_layers(recipe.layers, num_layers)
    shape = solve(
        neurons,
        active=recipe.active,
        experts=recipe.experts,
        experts_per_token=recipe.experts_per_token,
        shared=recipe.shared,
        shared_allowed=target.has_shared,
    )
    if method.fit is None and len(layers) < num_layers:
        raise MoefyError(
            f"--layers {recipe.layers} with --partition static: a dense class has one FFN width; "
            "convert all layers",
            code=2,
        )
    if method.fit is None:
        shape = pruned(shape)
    notes = [*check_tensors(checkpoint, family)]
    if method.fit is not None:
        notes += check_target(checkpoint.config, target, shape, len(layers))
    return Job(recipe, checkpoint, family, target, shape, layers, method, tuple(notes))


def _method(recipe: Recipe, control: bool) -> Method:
    """The stages a recipe names, with their options bound."""
    if recipe.router == "oracle" and not control:
        raise MoefyError(
            "--router oracle looks at every expert before choosing and cannot be written; it is "
            "a control of `moefy report`; expected linear or random",
            code=2,
        )
    split = _stage("partition", recipe.partition, "split", recipe.partition_options)
    fit = _stage("route", recipe.router, "fit", recipe.router_options)
    return Method(split, None if recipe.partition == "static" else fit, recipe.refit)


def _stage(
    package: str, name: str, function: str, options: Mapping[str, Any]
) -> Callable[..., Any]:
    folder = Path(__file__).parent / package
    known = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
    flag = {"partition": "--partition", "route": "--router"}[package]
    if name not in known:
        raise MoefyError(f"unknown {flag} {name!r}; {nearest(name, known)}", code=2)
    stage = getattr(importlib.import_module(f"moefy.{package}.{name}"), function)
    legal = {
        key: parameter.default
        for key, parameter in inspect.signature(stage).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != "generator"
    }
    for key, value in options.items():
        if key not in legal:
            known = nearest(key, list(legal))
            raise MoefyError(f"{flag} {name} has no option {key!r}; {known}", code=2)
        kinds = (float, int) if type(legal[key]) is float else (type(legal[key]),)
        if type(value) not in kinds or (type(value) in (float, int) and not value >= 0):
            expected = f"expected a value like {legal[key]!r}"
            raise MoefyError(f"{flag} {name}, option {key}: found {value!r}; {expected}", code=2)
    return partial(stage, **options)


def _check_device(name: str) -> None:
    kind, _, number = name.partition(":")
    if name in ("auto", "cpu"):
        return
    if kind != "cuda" or not (number or "0").isdecimal():
        raise MoefyError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:1", code=2)
    if int(number or 0) >= (count := torch.cuda.device_count()):
        raise MoefyError(f"--device {name}: {count} CUDA devices found; expected more", code=5)


def _target(recipe: Recipe, family: Family) -> Target:
    if recipe.partition == "static":
        return targets.load("dense")
    if recipe.target == "auto":
        return targets.load(family.targets[0])
    if recipe.target not in targets.names():
        raise MoefyError(
            f"unknown --target {recipe.target!r}; {nearest(recipe.target, targets.names())}", code=2
        )
    if recipe.target not in family.targets:
        raise MoefyError(
            f"--target {recipe.target} cannot hold {family.model_type} exactly; "
            f"expected one of {', '.join(family.targets)}",
            code=4,
        )
    return targets.load(recipe.target)
