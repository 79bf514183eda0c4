"""The dense checkpoint of a conversion, and which of its layers are dropped."""

from __future__ import annotations

from dataclasses import dataclass

from moefy.checkpoint.resolve import resolve
from moefy.checkpoint.tensors import Checkpoint
from moefy.checkpoint.validate import check_tensors, companion_files, open_checkpoint
from moefy.config.layer_names import dropped_layers
from moefy.config.recipe import Recipe
from moefy.convert.ffn import Method
from moefy.errors import MoefyError
from moefy.models import families
from moefy.models.families.family import Family


@dataclass(frozen=True)
class Source:
    """A dense checkpoint that has been checked, whatever is made of it."""

    checkpoint: Checkpoint
    family: Family
    notes: tuple[str, ...]

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.checkpoint.config["num_hidden_layers"])  # pyright: ignore[reportArgumentType]


def read_source(recipe: Recipe) -> Source:
    """The model that a recipe names, its headers and configuration checked.

    Raises:
        MoefyError: code 3 for a broken and 4 for an unsupported checkpoint.
    """
    folder = resolve(recipe.model, revision=recipe.revision)
    checkpoint = open_checkpoint(folder, ignore_index=recipe.ignore_index)
    companion_files(folder)
    family = families.load(str(checkpoint.config["model_type"]), checkpoint.config)
    checkpoint, notes = check_tensors(checkpoint, family)
    return Source(checkpoint, family, tuple(notes))


ALL = 0.9999
"""A larger fraction of the layers that are left is all of them: 0.9333 of 30 is meant as 28."""


def depth_of(recipe: Recipe, source: Source, method: Method) -> tuple[tuple[int, ...], float]:
    """The layers that the recipe names to drop, and the active fraction of those that are left.

    Layers that are chosen by their loss are not known yet, but count as dropped in the fraction.

    Raises:
        MoefyError: code 2, where those that are left have fewer neurons than are to be active, and
            where layers cannot go or be chosen.
    """
    num_layers, family = source.num_layers, source.family
    count, dropped = dropped_layers(recipe.drop_layers, num_layers)
    reason = None
    if count and family.beside:
        reason = f"{family.model_type} has as many layers in {family.beside}; leave the option out"
    elif count and method.gradient:
        reason = f"--partition {recipe.partition} takes gradients of the whole model; use another"
    elif count > len(dropped) and "ForCausalLM" not in family.tasks:
        reason = f"{family.model_type} has no next-token loss to choose by; name them, e.g. 4:6"
    if reason:
        raise MoefyError(f"--drop-layers {recipe.drop_layers}: {reason}", code=2)
    left = num_layers - count
    if left < max((not method.copies) * recipe.active * num_layers, 1):
        raise MoefyError(
            f"--drop-layers {recipe.drop_layers} leaves {max(left, 0)} of {num_layers} layers, too "
            f"few for --active {recipe.active:g}; lower one of them",
            code=2,
        )
    active = recipe.active * (num_layers / left)
    return tuple(dropped), 1.0 if active > ALL else active
