"""What a Mixture of Experts consists of, as its tensors tell, and which engines will run it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from moefy.checkpoint.validate import open_checkpoint
from moefy.errors import MoefyError
from moefy.files.safetensors_header import Entry
from moefy.inspect import MISREAD, SIZES, Config, Entries, head_dim, misread, number
from moefy.inspect.settled import as_dense
from moefy.models import families, targets
from moefy.models.engines import ENGINES, known_engines
from moefy.models.families.family import Family
from moefy.models.targets.target import Dense
from moefy.types import Shape

ROUTED = re.compile(
    r"\.(?:layers?|h|block)\.(\d+)\.(?:.*\.)?(?:experts\.(?:(\d+)\.)?|block_sparse_moe\.(?:in|out)put_linear\.)"
)
"""A tensor of routed experts: its layer, and its expert where each has tensors of its own."""

SHARED = re.compile(r"\.\d+\.(?:.*\.)?(?:shared|shared_experts?|shared_mlp)\.")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")

MOST_LAYERS = 10_000
"""A configuration may say anything."""


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
        """Parameters of routed experts that a token does not go to."""
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
    found = read_experts(config, entries)
    total = sum(entry.num_elements for entry in entries.values())
    sizes = {"head_dim": head_dim(config, entries)}
    told: dict[str, Any] = {
        "sizes": {**sizes, "ffn": found.shape.num_neurons} if found.shape else sizes,
        "parameters_active": total - found.idle,
        "experts": _told(found),
        "problems": [*_refused(folder), *_contradictions(found, config)],
        "serving": {},
    }
    model_type = config.get("model_type")
    if not found.shape or told["problems"] or model_type not in targets.names():
        return told
    try:
        dense = as_stored(config, entries, found)
        return told | {"tied": dense.tied, "serving": serving(model_type, dense, found.shape)}
    except MISREAD as error:
        return told | {"problems": [misread(folder, error)]}


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
    """The experts of a checkpoint: how many and how wide as stored, how many per token as told."""
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
    width = {min(found) if found else 0 for found in widths.values()}
    shape = None
    if count and per_token and len(width) == 1 and width != {0}:
        num_shared, expert_width = min(shared, default=0), width.pop()
        neurons = num_shared + count * expert_width
        shape = Shape(neurons, num_shared, count, expert_width, per_token)
    num_layers = min(number(config, SIZES["layers"]) or 0, MOST_LAYERS)
    dense_layers = tuple(n for n in range(num_layers) if n not in widths)
    return Experts(tuple(sorted(widths)), parameters, shape, count, per_token, dense_layers)


def _width(entry: Entry, hidden: int | None, rank: int) -> list[int]:
    """The neurons of an expert's matrix: the side that is not the model's. None for a bias."""
    if len(entry.shape) != rank:
        return []
    return [next((side for side in entry.shape[-2:] if side != hidden), entry.shape[-1])]


def serving(model_type: str, dense: Dense, shape: Shape) -> dict[str, dict[str, Any]]:
    """For each engine: whether it runs the model (None: not known), why not, and what to heed."""
    verdicts = {}
    for engine in ENGINES:
        if model_type not in engine.classes:
            known = ", ".join(known_engines(model_type))
            reasons = [f"not known to run {model_type}; known: {known}"]
            verdicts[engine.name] = {"runs": None, "reasons": reasons, "notes": []}
            continue
        reasons = engine.issues(model_type, dense, shape, stored=True)
        notes = engine.heed(dense, shape, stored=True)
        verdicts[engine.name] = {"runs": not reasons, "reasons": reasons, "notes": notes}
    return verdicts


def _told(found: Experts) -> dict[str, Any]:
    shape = found.shape
    return {
        "count": found.count,
        "per_token": found.per_token,
        "width": shape and shape.expert_width,
        "shared_width": shape and shape.num_shared,
        "active_fraction": shape and round(shape.active_fraction, 4),
        "layers": len(found.layers),
        "dense_layers": list(found.dense_layers),
        "parameters": found.parameters,
        "parameters_idle": found.idle,
    }


def _refused(folder: Path) -> list[MoefyError]:
    """What `open_checkpoint` finds, but that there are experts already."""
    try:
        open_checkpoint(folder)
    except MoefyError as error:
        return [] if "already a Mixture of Experts" in str(error) else [error]
    return []


def _contradictions(found: Experts, config: Config) -> list[MoefyError]:
    """Where the configuration and the tensors do not fit each other."""
    said, problems = number(config, EXPERTS), []
    if found.layers and said is not None and said != found.count:
        problems.append(f"config.json has {said} experts, the tensors {found.count}")
    if found.count and found.per_token and found.per_token > found.count:
        problems.append(f"{found.per_token} experts per token, but only {found.count} experts")
    if found.count and not found.per_token:
        problems.append(f"config.json has none of {', '.join(PER_TOKEN)}")
    return [MoefyError(problem) for problem in problems]


def _sibling(model_type: str, config: Config) -> Family:
    """The dense family inside, or one that the class can hold: engines ask for the same keys."""
    inside = config.get("dense")
    if isinstance(inside, dict) and inside.get("model_type") in families.names():
        return families.load(inside["model_type"], inside)
    known = map(families.load, families.names())
    return next(family for family in known if model_type in family.targets)
