"""A stored configuration with the defaults of transformers, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moefy.inspect import Config, Entries, head_dim
from moefy.models.families.family import Family
from moefy.models.families.smollm3 import rotates
from moefy.models.targets.target import Dense

WINDOW_OFF = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")
"""Types whose sliding window is off unless `use_sliding_window` is on."""

WINDOW_ON = dict.fromkeys(("mistral", "ministral", "cohere2", "cohere2_moe"), 4096)
WINDOW_ON |= {"cwm": 8192}
"""Types with a sliding window where the configuration has no such key, and how long it is."""


def as_dense(
    family: Family, config: Config, entries: Entries, left_dense: tuple[int, ...] = ()
) -> Dense:
    """A checkpoint as targets see it, dense or with experts."""
    filled = family.sized(config)
    filled = {
        **filled,
        **_windows(filled),
        "rope_parameters": _rope(config),
        "head_dim": head_dim(filled, entries),
    }
    stored = {name.rpartition("self_attn.")[2] for name in entries if "self_attn." in name}
    biases = frozenset(part for part in "qkvo" if f"{part}_proj.bias" in stored)
    tied = family.tied(config, entries)
    return Dense(family, family.canonical(filled), filled, biases, tied, left_dense)


def _rope(config: Config) -> dict[str, Any]:
    """Rotary parameters, from where older versions of transformers have them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    share = config.get("partial_rotary_factor")
    result = {"rope_theta": config.get("rope_theta", 10000.0), **rope, "rope_type": kind}
    return result if share is None else {"partial_rotary_factor": share, **result}


def _windows(config: Config) -> dict[str, Any]:
    """The sliding window's size, and the type of each layer, where it is not stored."""
    model_type, types = config["model_type"], config.get("layer_types")
    window = config.get("sliding_window", WINDOW_ON.get(model_type))
    if model_type in WINDOW_OFF and not config.get("use_sliding_window", False):
        window = None
    if types is None and model_type in TYPES:
        types = [TYPES[model_type](config, number) for number in range(config["num_hidden_layers"])]
    return {"sliding_window": window, "layer_types": types}


def _late(config: Config, layer: int) -> str:
    return _local(layer >= config.get("max_window_layers", 28))


def _early_even(config: Config, layer: int) -> str:
    return _local(layer % 2 == 0 and layer < config.get("max_window_layers", 28))


def _all_but_each_last(config: Config, layer: int) -> str:
    return _local((layer + 1) % config.get("sliding_window_pattern", 4) != 0)


def _all_but_each_first(config: Config, layer: int) -> str:
    return _local(layer % 4 != 0)


def _unrotated(config: Config, layer: int) -> str:
    return _local(not rotates(config, layer))


def _listed(config: Config, layer: int) -> str:
    idxs = config.get("full_attn_idxs")
    return "full_attention" if idxs is None or layer in idxs else "conv"


def _local(local: bool) -> str:
    return "sliding_attention" if local else "full_attention"


TYPES: dict[str, Callable[[Config, int], str]] = {
    "qwen2": _late,
    "qwen3": _late,
    "qwen2_moe": _early_even,
    "cohere2": _all_but_each_last,
    "cohere2_moe": _all_but_each_last,
    "cwm": _all_but_each_first,
    "smollm3": _unrotated,
    "lfm2": _listed,
    "lfm2_moe": _listed,
}
"""The type of a layer, in classes that do not treat all layers alike."""
