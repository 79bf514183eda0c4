"""The stock classes that can hold a dense checkpoint, with their shapes and engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moefy.checkpoint.tensor_names import layer_pattern
from moefy.checkpoint.tensors import Checkpoint
from moefy.checkpoint.validate import open_checkpoint
from moefy.errors import MoefyError
from moefy.inspect import COMPUTED, MISREAD, Config, Entries, head_dim, misread
from moefy.inspect.catalogue import SHARED
from moefy.inspect.config_defaults import as_dense
from moefy.models import families, targets
from moefy.models.choice import choose, layer_sizes
from moefy.models.cost import Layer
from moefy.models.engines import ENGINES, NO_SHAPE, engine_issues, known_engines
from moefy.models.families.family import Family
from moefy.models.shape import solve
from moefy.models.targets.target import Dense, Target
from moefy.types import Shape

ACTIVE = (0.75, 0.5, 0.25)
"""Values of `--active` for which a shape is shown."""

UNITS = (128, 32)
"""Expert widths suit fused kernels in multiples of the first, quantised formats in the second."""

MOST_EXPERTS = 128
"""The largest number of experts that is shown."""

Fits = Callable[[Shape], bool]


def describe(folder: Path, config: Config, entries: Entries) -> dict[str, Any]:
    """The targets and engines of a dense checkpoint, or why it cannot be converted."""
    try:
        return _possible(open_checkpoint(folder), entries)
    except MoefyError as error:
        problem = error
    except MISREAD as error:
        problem = misread(folder, error)
    return {"problems": [problem], "convertible": False, "targets": {}, "engines": {}}


def _possible(checkpoint: Checkpoint, entries: Entries) -> dict[str, Any]:
    """The targets and engines of a whole checkpoint."""
    family = families.load(str(checkpoint.config["model_type"]), checkpoint.config)
    dense = as_dense(family, checkpoint.config, checkpoint.entries)
    num_neurons = family.num_neurons(checkpoint.config)
    sizes = layer_sizes(family, checkpoint.config, checkpoint.entries)
    shapes: dict[Fits, dict[float, Shape | None]] = {}
    held = {}
    for name in (*family.targets, targets.OWN):
        target = targets.load(name, family)
        if target.fits not in shapes:
            shapes[target.fits] = {active: _shape(sizes, active, target) for active in ACTIVE}
        held[name] = _held(target, dense, num_neurons, shapes[target.fits])
    return {
        "sizes": {
            "ffn": num_neurons,
            "kv_heads": dense.config.get("num_key_value_heads"),
            "head_dim": head_dim(checkpoint.config, entries),
        },
        "tied": dense.tied,
        "floor": _floor(family, checkpoint.entries, dense.num_layers),
        "convertible": any(target["holds"] for target in held.values()),
        "missing_feature": None if family.targets else family.missing_feature,
        "targets": held,
        "engines": {
            engine.name: [name for name in family.targets if engine.name in held[name]["engines"]]
            for engine in ENGINES
        },
        "problems": [],
    }


def _floor(family: Family, entries: Entries, num_layers: int) -> dict[str, Any]:
    """Parameters that no split of the FFNs can spare a token, and what a dropped layer takes off
    them and off all parameters, on average over the layers."""
    counts = {name: e.num_elements for name, e in entries.items() if not COMPUTED.search(name)}
    total = sum(counts.values())
    ffn = sum(counts[name] for layer in range(num_layers) for name in family.ffn_names(layer))
    pattern = layer_pattern(family.layer)
    layers = sum(count for name, count in counts.items() if pattern.match(name))
    return {
        "parameters": total - ffn,
        "share": round((total - ffn) / total, 4),
        "layer": (layers - ffn) // num_layers,
        "layer_with_ffn": layers // num_layers,
    }


def _held(
    target: Target, dense: Dense, num_neurons: int, shapes: dict[float, Shape | None]
) -> dict[str, Any]:
    """Whether and how a class can hold a model, and which engines run the result."""
    reason = target.why_unsupported(dense)
    shape = next((shapes[active] for active in (0.5, *ACTIVE) if shapes[active]), None)
    known = [] if reason else known_engines(target.model_type)
    issues = {} if reason else engine_issues(target.model_type, dense, shape or NO_SHAPE)
    return {
        "stock": target.model_type != targets.OWN,
        "holds": reason is None,
        "reason": reason,
        "shared": SHARED[target.fits],
        "elastic": target.elastic,
        "engines": [engine for engine in known if engine not in issues],
        "engine_issues": issues,
        "shapes": {
            f"{active:g}": shape and {**dataclasses.asdict(shape), "active": shape.active_fraction}
            for active, shape in ({} if reason else shapes).items()
        },
        "widths": {}
        if reason
        else {str(unit): _widths(num_neurons, unit, target) for unit in UNITS},
    }


def _shape(sizes: Layer, active: float, target: Target) -> Shape | None:
    """The shape that `--active` alone leads to where all layers are converted, if there is one."""
    if choice := choose(sizes, active, target.fits, ()):
        return choice.shape
    try:
        return solve(sizes.num_neurons, active=active, fits=target.fits)
    except MoefyError:
        return None


def _widths(num_neurons: int, unit: int, target: Target) -> dict[str, int]:
    """Expert counts -> the widest multiple of `unit` that the experts can have."""
    widths = {}
    for count in range(2, MOST_EXPERTS + 1):
        widest = num_neurons // count // unit * unit
        for width in range(widest, 0, -unit):
            if target.fits(Shape(num_neurons, num_neurons - count * width, count, width, 1)):
                widths[str(count)] = width
                break
    return widths
