"""The partition and the router that a recipe names, with their options checked and bound."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moefy.config.options import Field, Option, nearest
from moefy.config.recipe import Recipe
from moefy.convert.ffn import Method
from moefy.convert.profile import SAMPLE
from moefy.errors import MoefyError
from moefy.types import Range


def stages(recipe: Recipe, *, control: bool = False) -> Method:
    """The stages a recipe names, with their options bound.

    `control` admits routers that evaluation uses and that cannot be written.

    Raises:
        MoefyError: code 2 for names, options and combinations that cannot be.
    """
    partition = _module("partition", recipe.partition)
    router = _module("router", recipe.router)
    routed = getattr(partition, "ROUTED", True)
    copies = getattr(partition, "COPIES", False)
    _check_copies(recipe, partition if copies else None)
    if recipe.overlap > 1 and routed and not getattr(partition, "OVERLAPS", False):
        raise MoefyError(
            f"--overlap {recipe.overlap:g} with --partition {recipe.partition}, whose experts do "
            f"not overlap; expected {Recipe.partition}",
            code=2,
        )
    if not control and not getattr(router, "WRITABLE", True):
        raise MoefyError(
            f"--router {recipe.router} looks at activations before it chooses and cannot be "
            "written; expected another --router, or an evaluation: "
            f"`moefy report RUN --against router={recipe.router}`",
            code=2,
        )
    only = getattr(router, "PARTITION", recipe.partition)
    if routed and recipe.partition != only:
        raise MoefyError(
            f"--router {recipe.router} with --partition {recipe.partition}: its experts are not "
            f"made for the router's clusters; expected --partition {only}",
            code=2,
        )
    whole = getattr(partition, "WHOLE", False)
    split = _bound("partition", partition.split, recipe.partition_options)
    fit = _bound("router", router.fit, recipe.router_options)
    refine = None
    if routed and recipe.refit and hasattr(router, "refine"):
        refine = _bound("router", router.refine, recipe.router_options)
    router_sizes = {}
    if routed and hasattr(router, "sizes"):
        router_sizes = _bound("router", router.sizes, recipe.router_options)(recipe.sequence_length)
    return Method(
        split,
        fit if routed else None,
        recipe.refit,
        refine,
        recipe.drift if recipe.refit else 0.0,
        router_sizes=router_sizes,
        gradient=getattr(partition, "GRADIENT", False),
        polish=recipe.polish,
        ranked=recipe.shadow > 0,
        sample=None if whole else int(recipe.partition_options.get("sample", SAMPLE)),
        copies=copies,
        noise=recipe.noise,
        reinit=recipe.reinit,
    )


def _check_copies(recipe: Recipe, copies: Any) -> None:
    """Refuse what does not go with `copies`, the module of that partition; or, without it, options
    that only copies have."""
    size, method = recipe.granularity, "--method upcycle"
    if copies is None:
        own = {"granularity": 1, "noise": 0.0, "reinit": 0.0}
        named = [f"--{key}" for key, default in own.items() if getattr(recipe, key) != default]
        problem = f"{', '.join(named)} without copies; expected {method}" if named else None
    elif recipe.active != 1:
        problem = f"--active {recipe.active:g}: a copy holds all neurons; drop it ({method})"
    elif recipe.overlap > 1:
        problem = f"--overlap {recipe.overlap:g}: copies overlap whole; drop it ({method})"
    elif recipe.refit:
        problem = f"--refit: copies lose nothing that a refit could make good; drop it ({method})"
    elif recipe.polish:
        problem = f"--polish {recipe.polish}: copies lose nothing; drop it ({method})"
    elif recipe.shadow:
        problem = f"--shadow {recipe.shadow:g}: another copy answers for a lost one ({method})"
    elif recipe.router not in copies.ROUTERS:
        known = " or ".join(copies.ROUTERS)
        problem = (
            f"--router {recipe.router} compares experts, and copies are alike; expected {known}"
        )
    elif size & (size - 1):
        problem = f"--granularity is {size}; expected a power of two, by which weights stay exact"
    else:
        problem = None
    if problem:
        raise MoefyError(problem, code=2)


def _module(package: str, name: str) -> Any:
    return importlib.import_module(f"moefy.convert.{package}.{name.replace('-', '_')}")


def options_of(stage: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The options of a stage by name: their defaults and their annotations.

    They are the stage's keyword-only parameters, or the fields of the one named `options`.
    """
    hints = get_type_hints(stage, include_extras=True)
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(stage).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != "generator"
    }
    if "options" in defaults:
        hints = get_type_hints(hints["options"], include_extras=True)
        defaults = vars(defaults["options"])
    return {key: (default, hints[key]) for key, default in defaults.items()}


def _bound(name: str, stage: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The stage called `name` with its options, which are checked."""
    known = options_of(stage)
    for key, value in options.items():
        if key not in known:
            raise MoefyError(f"unknown {name}.{key}; {nearest(key, [*known])}", code=2)
        default, hint = known[key]
        more = get_args(hint)
        span = next((part for part in more if isinstance(part, Range)), Range(0))
        choices = more if get_origin(hint) is Literal else ()
        option = Option("", span.least, span.most, choices, flag=False)
        Field(f"{name}.{key}", type(default), False, default, option).checked(value)
    if "options" in inspect.signature(stage).parameters:
        return partial(stage, options=get_type_hints(stage)["options"](**options))
    return partial(stage, **options)
