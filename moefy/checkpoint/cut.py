"""A checkpoint without some of its layers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from moefy.checkpoint.model_config import model_config
from moefy.checkpoint.tensor_names import layer_pattern
from moefy.checkpoint.tensors import Checkpoint
from moefy.errors import MoefyError
from moefy.models.families.family import Family
from moefy.models.load import model_of, some_layers


def without(checkpoint: Checkpoint, family: Family, dropped: Collection[int]) -> Checkpoint:
    """The checkpoint less some layers: the others are numbered anew, and lists of the configuration
    with an entry for each layer are cut.

    Nothing is read: the tensors are those of the same files.

    Raises:
        MoefyError: code 2 for numbers that are no layers, and where no layer is left.
    """
    if not dropped:
        return checkpoint
    config = model_config(checkpoint)
    count = config.num_hidden_layers
    kept = [layer for layer in range(count) if layer not in dropped]
    if len(kept) + len(set(dropped)) != count or not kept:
        numbers = ", ".join(map(str, sorted(dropped)))
        raise MoefyError(
            f"layers {numbers} cannot be dropped of {count}; expected some of 0 to {count - 1}, "
            "not all",
            code=2,
        )
    whole, fewer = config.to_dict(), some_layers(config, kept).to_dict()
    changed = {key: value for key, value in fewer.items() if value != whole.get(key)}
    pattern, entries = layer_pattern(family.layer), {}
    for name, entry in checkpoint.entries.items():
        match = pattern.match(name)
        if not match:
            entries[name] = entry
        elif int(match[1]) in kept:
            prefix = family.layer.format(layer=kept.index(int(match[1])))
            entries[prefix + name[match.end() :]] = entry
    sizes = {"num_hidden_layers": len(kept)}  # the usual key, which a family may name otherwise
    return Checkpoint(checkpoint.folder, {**checkpoint.config, **changed, **sizes}, entries)


def num_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of a checkpoint, all of which a token uses."""
    return sum(entry.num_elements for entry in checkpoint.entries.values())


def open_cut(checkpoint: Checkpoint, *, dtype: torch.dtype, task: str = "ForCausalLM") -> Any:
    """A checkpoint, whole or cut, as a model of transformers' own class, in memory.

    Raises:
        MoefyError: code 3 where the class does not take its tensors.
    """
    state = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    return model_of(checkpoint.folder, model_config(checkpoint), state, task=task, dtype=dtype)
