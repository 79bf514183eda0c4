"""The experts of a Mixture of Experts, by its tensors, and the engines that run it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from moefy.checkpoint.validate import open_checkpoint
from moefy.errors import MoefyError
from moefy.files.safetensors_header import Entry, read_json
from moefy.inspect import MISREAD, SIZES, Config, Entries, head_dim, misread, number
from moefy.inspect.config_defaults import as_dense
from moefy.models import families, targets
from moefy.models.engines import ENGINES, known_engines
from moefy.models.families.family import Family
from moefy.models.targets.target import Dense
from moefy.types import Shape

ROUTED = re.compile(
    r"\.(?:layers?|h|block)\.(\d+)\.(?:.*\.)?(?:experts\.(?:(\d+)\.)?|block_sparse_moe\.(?:in|out)put_linear\.)"
)
"""A tensor of routed experts: its layer, and its expert if each has its own tensors."""

SHARED = re.compile(r"\.\d+\.(?:.*\.)?(?:shared|shared_experts?|shared_mlp)\.")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")

REPORT_BYTES = 10**8
"""The longest report of a conversion that is read."""

MOST_LAYERS = 10_000
"""A limit, for a configuration may hold any number."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of a model, as stored and configured."""

    layers: tuple[int, ...]
    """Layers that have routed experts."""
    parameters: int
    """Of all routed experts."""
    shape: Shape | None
    """Of each layer; None when sizes are missing or differ between layers."""
    count: int | None
    per_token: int | None
    dense_layers: tuple[int, ...]
    """Layers that have none."""

    @property
    def idle(self) -> int:
        """Parameters of the routed experts that a token does not use."""
        if not self.count or not self.per_token:
            return 0
        return self.parameters * max(self.count - self.per_token, 0) // self.count


def is_moe(config: Config, entries: Entries) -> bool:
    """Whether a checkpoint has routed experts; by its configuration if nothing can be read."""
    if entries:
        return any(ROUTED.search(name) for name in entries)
    return bool(number(config, EXPERTS))


def describe(folder: Path, config: Config, entries: Entries) -> dict[str, Any]:
    """Experts and engines of a Mixture of Experts."""
    experts = read_experts(config, entries)
    total = sum(entry.num_elements for entry in entries.values())
    sizes = {"head_dim": head_dim(config, entries)}
    result: dict[str, Any] = {
        "sizes": {**sizes, "ffn": experts.shape.num_neurons} if experts.shape else sizes,
        "parameters_active": total - experts.idle,
        "experts": _facts(experts, _granularity(folder)),
        "problems": [*_refused(folder), *_contradictions(experts, config)],
        "serving": {},
    }
    model_type = config.get("model_type")
    if not experts.shape or result["problems"] or model_type not in targets.names():
        return result
    try:
        dense = as_stored(config, entries, experts)
        return result | {"tied": dense.tied, "serving": serving(model_type, dense, experts.shape)}
    except MISREAD as error:
        return result | {"problems": [misread(folder, error)]}


def as_stored(config: Config, entries: Entries, experts: Experts) -> Dense:
    """A checkpoint of a known class as engines see it, dense or with experts."""
    model_type = config["model_type"]
    if not experts.layers:
        return as_dense(families.load(model_type, config), config, entries)
    family = _sibling(model_type, config)
    # A class with experts may read these keys, whatever the dense class does.
    family = dataclasses.replace(family, windows="some", partial_rotary=True)
    return as_dense(family, config, entries, experts.dense_layers)


def read_experts(config: Config, entries: Entries) -> Experts:
    """The experts of a checkpoint: number and width by its tensors, top-k by its configuration."""
    hidden = number(config, SIZES["hidden"])
    widths: dict[int, list[int]] = {}
    numbers: set[str] = set()
    shared: set[int] = set()
    parameters = stacked = 0
    for name, entry in entries.items():
        if match := ROUTED.search(name):
            rank = 3
            if match[2]:
                rank = 2
                numbers.add(match[2])
            elif len(entry.shape) == rank:  # one matrix for each expert
                stacked = max(stacked, entry.shape[0])
            widths.setdefault(int(match[1]), []).extend(_width(entry, hidden, rank))
            parameters += entry.num_elements
        elif SHARED.search(name):
            shared |= {*_width(entry, hidden, 2)}
    count = len(numbers) or stacked or number(config, EXPERTS)
    per_token = number(config, PER_TOKEN)
    # Gate and up may be one matrix of twice the width.
    width = {min(sizes, default=0) for sizes in widths.values()}
    shape = None
    if count and per_token and len(width) == 1 and width != {0}:
        num_shared, expert_width = min(shared, default=0), width.pop()
        neurons = num_shared + count * expert_width
        shape = Shape(neurons, num_shared, count, expert_width, per_token)
    num_layers = min(number(config, SIZES["layers"]) or 0, MOST_LAYERS)
    dense_layers = tuple(n for n in range(num_layers) if n not in widths)
    return Experts(tuple(sorted(widths)), parameters, shape, count, per_token, dense_layers)


def _width(entry: Entry, hidden: int | None, rank: int) -> list[int]:
    """The neurons of an expert's matrix, the side that is not the hidden size; none for a bias."""
    if len(entry.shape) != rank:
        return []
    return [next((side for side in entry.shape[-2:] if side != hidden), entry.shape[-1])]


def serving(model_type: str, dense: Dense, shape: Shape) -> dict[str, dict[str, Any]]:
    """For each engine: whether it runs the model (None: not known), why not, and notes."""
    verdicts = {}
    for engine in ENGINES:
        if model_type not in engine.classes:
            known = ", ".join(known_engines(model_type))
            reasons = [f"not known to run {model_type}; known: {known}"]
            verdicts[engine.name] = {"runs": None, "reasons": reasons, "notes": []}
            continue
        reasons = engine.issues(model_type, dense, shape, stored=True)
        notes = engine.warnings(dense, shape, stored=True)
        verdicts[engine.name] = {"runs": not reasons, "reasons": reasons, "notes": notes}
    return verdicts


def _granularity(folder: Path) -> int:
    """Experts that make up a copy of the dense FFN, where moefy has written copies; else 0."""
    place = folder / "moefy" / "conversion.json"
    if not place.is_file():  # to open a named pipe would wait for ever
        return 0
    try:
        report = read_json(place, REPORT_BYTES)
        return int(report["shape"].get("granularity", 0))
    except (OSError, MoefyError, *MISREAD):
        return 0


def _facts(experts: Experts, granularity: int) -> dict[str, Any]:
    shape = experts.shape
    if shape and granularity:
        neurons = shape.num_shared + granularity * shape.expert_width
        shape = dataclasses.replace(shape, num_neurons=neurons, granularity=granularity)
    return {
        "count": experts.count,
        "per_token": experts.per_token,
        "copies": experts.count // granularity if experts.count and granularity else None,
        "width": shape and shape.expert_width,
        "shared_width": shape and shape.num_shared,
        "active_fraction": shape and round(shape.active_fraction, 4),
        "layers": len(experts.layers),
        "dense_layers": list(experts.dense_layers),
        "parameters": experts.parameters,
        "parameters_idle": experts.idle,
    }


def _refused(folder: Path) -> list[MoefyError]:
    """The problems that `open_checkpoint` finds, except that there are experts already."""
    try:
        open_checkpoint(folder)
    except MoefyError as error:
        return [] if "already a Mixture of Experts" in str(error) else [error]
    return []


def _contradictions(experts: Experts, config: Config) -> list[MoefyError]:
    """Contradictions between the configuration and the tensors."""
    configured, problems = number(config, EXPERTS), []
    if experts.layers and configured is not None and configured != experts.count:
        problems.append(f"config.json has {configured} experts, the tensors {experts.count}")
    if experts.count and experts.per_token and experts.per_token > experts.count:
        problems.append(f"{experts.per_token} experts per token, but only {experts.count} experts")
    if experts.count and not experts.per_token:
        problems.append(f"config.json has none of {', '.join(PER_TOKEN)}")
    return [MoefyError(problem) for problem in problems]


def _sibling(model_type: str, config: Config) -> Family:
    """The dense family inside, or one that the class can hold: engines ask for the same keys."""
    inside = config.get("dense")
    if isinstance(inside, dict) and inside.get("model_type") in families.names():
        return families.load(inside["model_type"], inside)
    known = map(families.load, families.names())
    return next(family for family in known if model_type in family.targets)
