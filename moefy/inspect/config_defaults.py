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
    layers = range(config.get("num_hidden_layers", 0))
    if types is None and (local := LOCAL.get(model_type)):
        types = [f"{'sliding' if local(config, n) else 'full'}_attention" for n in layers]
    elif types is None and model_type in ("lfm2", "lfm2_moe"):
        full = layers if (own := config.get("full_attn_idxs")) is None else own
        types = ["full_attention" if n in full else "conv" for n in layers]
    return {"sliding_window": window, "layer_types": types}


LOCAL: dict[str, Callable[[Config, int], bool]] = {
    "qwen2": lambda config, n: n >= config.get("max_window_layers", 28),
    "qwen2_moe": lambda config, n: n % 2 == 0 and n < config.get("max_window_layers", 28),
    "cohere2": lambda config, n: (n + 1) % config.get("sliding_window_pattern", 4) != 0,
    "cwm": lambda config, n: n % 4 != 0,
    "smollm3": lambda config, n: not rotates(config, n),
}
LOCAL |= {"qwen3": LOCAL["qwen2"], "cohere2_moe": LOCAL["cohere2"]}
"""Whether a layer has the sliding window, in classes that do not treat all layers alike."""
