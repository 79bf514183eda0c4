"""What a recipe leaves open: the class, the shape, and whether layers may stay dense."""

from __future__ import annotations

import dataclasses

from moefy.checkpoint.model_config import model_config
from moefy.checkpoint.tensors import Checkpoint
from moefy.config.methods import COPIES
from moefy.config.options import nearest
from moefy.config.recipe import OWN_CLASS_ROUTERS, Recipe
from moefy.convert.ffn import Method
from moefy.errors import MoefyError
from moefy.models import targets
from moefy.models.choice import Choice, choose, layer_sizes
from moefy.models.engines import ENGINES, NO_SHAPE, Engine
from moefy.models.families.family import Family
from moefy.models.shape import copied, solve
from moefy.models.targets.target import Dense, Target
from moefy.types import Shape

COPIED = dataclasses.replace(NO_SHAPE, granularity=1)
"""The shape of copies, as far as checks of engines look at it before it is known."""

USUAL_COPIES, USUAL_CHOSEN = 8, 2
"""Copies, and those that a token goes to, where a recipe says neither: as in arXiv 2410.07524."""


def describe(checkpoint: Checkpoint, family: Family, layers: list[int]) -> Dense:
    """The dense model as targets see it, `layers` of which are to be converted."""
    own = family.sized(model_config(checkpoint).to_dict())
    config = family.canonical(own)
    first = family.layer.format(layer=0)
    biases = {part for part in "qkvo" if f"{first}self_attn.{part}_proj.bias" in checkpoint.entries}
    left = tuple(n for n in range(int(config["num_hidden_layers"])) if n not in layers)
    tied = family.tied(own, checkpoint.entries)
    return Dense(family, config, own, frozenset(biases), tied, left)


def choose_target(recipe: Recipe, family: Family, dense: Dense) -> tuple[Target, str]:
    """The class to write, and why: the one that was asked for, or the family's first that can
    hold the model and that all `--engines` run.

    Raises:
        MoefyError: code 2 for names that are not known, 4 where no class will do.
    """
    if recipe.target != "auto" and recipe.target not in targets.names():
        raise MoefyError(
            f"unknown --target {recipe.target!r}; {nearest(recipe.target, targets.names())}", code=2
        )
    own = f"{targets.OWN}, which runs in transformers only"
    if recipe.target not in ("auto", targets.OWN, *family.targets):
        raise MoefyError(
            f"--target {recipe.target} cannot hold {family.model_type} exactly; "
            f"expected one of {', '.join([*family.targets, own])}",
            code=4,
        )
    if recipe.target == "auto" and not family.targets:
        raise MoefyError(
            f"no stock MoE class holds {family.model_type} exactly: none has "
            f"{family.missing_feature}; ask for --target {own}, if that will do",
            code=4,
        )
    if recipe.router in OWN_CLASS_ROUTERS and recipe.target != targets.OWN:
        raise MoefyError(
            f"--router {recipe.router}: no stock class holds it; expected --target {own}, or "
            f"--router {Recipe.router}",
            code=4,
        )
    if recipe.router == "position" and not family.tells_positions:
        raise MoefyError(
            f"--router position: the layers of {family.model_type} are not told where a token "
            f"stands; expected --router {Recipe.router} or mlp",
            code=4,
        )
    engines, copies = named_engines(recipe), recipe.partition == COPIES
    candidates = family.targets if recipe.target == "auto" else (recipe.target,)
    against: list[str] = []
    for name in candidates:
        target = targets.load(name, family)
        if reason := _why_not(target, dense, engines, copies):
            against.append(f"{name}: {reason}")
        elif recipe.target != "auto":
            return target, "asked for"
        else:
            after = f"; not {'; not '.join(against)}" if against else ""
            return target, f"the first choice for {family.model_type}{after}"
    raise MoefyError(
        f"no class holds this {family.model_type} model"
        + (f" for {', '.join(engine.name.lower() for engine in engines)}" if engines else "")
        + f": {'; '.join(against)}",
        code=4,
    )


def named_engines(recipe: Recipe) -> list[Engine]:
    """The engines that must run the result.

    Raises:
        MoefyError: code 2 for a name that is not known.
    """
    known = {engine.name.lower(): engine for engine in ENGINES}
    names = [name.strip() for name in recipe.engines.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise MoefyError(f"unknown --engines {name!r}; {nearest(name, [*known])}", code=2)
    return [known[name] for name in names]


def _why_not(target: Target, dense: Dense, engines: list[Engine], copies: bool) -> str | None:
    """Why a class cannot hold a model, or copies, or which of the engines do not run it."""
    name, shape = target.model_type, COPIED if copies else NO_SHAPE
    if copies and not target.copies:
        return "its gates cannot be softmax weights that sum to one, as those of copies must"
    if missing := [engine.name for engine in engines if name not in engine.classes]:
        return target.why_unsupported(dense) or f"not in {', '.join(missing)}"
    issues = (
        f"{engine.name} {issue}"
        for engine in engines
        for issue in engine.issues(name, dense, shape)
    )
    return target.why_unsupported(dense) or "; ".join(issues) or None


def choose_shape(
    recipe: Recipe,
    method: Method,
    checkpoint: Checkpoint,
    dense: Dense,
    target: Target,
    active: float,
) -> tuple[Shape, Choice | None]:
    """The shape that answers a recipe and, where that leaves it open, why it is this one.

    `active` is the fraction of the layers that are left, where the recipe's is of all.
    """
    family, routed = dense.family, method.fit is not None
    num_neurons = family.num_neurons(checkpoint.config)
    if method.copies:
        count, k = recipe.experts or USUAL_COPIES, recipe.top_k or USUAL_CHOSEN
        slices, shared = recipe.granularity, recipe.shared_fraction
        return copied(num_neurons, count, k, slices, shared, target.fits), None
    asked = (recipe.experts, recipe.top_k, recipe.shared_fraction)
    if routed and recipe.overlap == 1 and all(number is None for number in asked):
        engines = named_engines(recipe)

        def fits(shape: Shape) -> bool:
            issues = (engine.issues(target.model_type, dense, shape) for engine in engines)
            return target.fits(shape) and not any(issues)

        sizes = layer_sizes(family, checkpoint.config, checkpoint.entries)
        if choice := choose(sizes, active, fits, [engine.name for engine in engines]):
            return choice.shape, choice
    shape = solve(
        num_neurons,
        active=active,
        experts=recipe.experts,
        experts_per_token=recipe.top_k,
        shared=recipe.shared_fraction,
        fits=target.fits if routed else None,
        total=recipe.overlap if routed else 1.0,
    )
    return shape, None


def why_all_layers(
    recipe: Recipe, method: Method, family: Family, checkpoint: Checkpoint, active: float
) -> str | None:
    """Why `--layers auto` converts all layers without measuring any; None if it measures.

    Empty where that is no surprise: for a class without experts, and for few layers.
    """
    num_layers = int(checkpoint.config["num_hidden_layers"])  # pyright: ignore[reportArgumentType]
    if method.fit is None or most_dense(num_layers, active) == 0:
        return ""
    if "ForCausalLM" not in family.tasks:
        return f"{family.model_type} has no next-token loss to weigh layers by"
    first_dense = describe(checkpoint, family, list(range(1, num_layers)))
    try:
        choose_target(recipe, family, first_dense)
    except MoefyError:
        return "no class that the recipe admits can leave one dense"
    return None


def most_dense(num_layers: int, active: float) -> int:
    """How many layers may stay dense before the others run less than half of `active`."""
    if active >= 1:
        return 0
    return int(num_layers * (active / 2) / (1 - active / 2) + 1e-9)
