"""Names that a checkpoint gives its tensors and its class: the stock ones, or whose else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError
from moefy.models.families.family import Family

INNER = "save the model that is inside, with save_pretrained()"
MERGE = "merge the adapter first (merge_and_unload), then save_pretrained()"
WRAPPERS = {
    "_orig_mod": ("torch.compile leaves", INNER),
    "module": ("DataParallel and DistributedDataParallel leave", INNER),
    "_fsdp_wrapped_module": ("FSDP leaves", INNER),
    "_checkpoint_wrapped_module": ("activation checkpointing leaves", INNER),
    "_forward_module": ("Lightning leaves", INNER),
    "base_model": ("PEFT leaves around a model with an adapter", MERGE),
    "base_layer": ("PEFT leaves where an adapter is not merged", MERGE),
    "language_model": ("models of text and pictures or sound have", INNER),
}
"""A part of a name that no text model has: who leaves it, and what to do."""

HEAD = re.compile(r"(For[A-Z]\w*|RewardModel)$")
"""How the name of a class with a head ends."""

SYNONYMS = ("ForConditionalGeneration", "ForPreTraining")
"""Endings that do not tell the task."""


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that something around the model has left its mark on.

    Raises:
        MoefyError: code 3.
    """
    for name in names:
        for part in name.split(".")[:-1]:
            if part in WRAPPERS:
                whose, advice = WRAPPERS[part]
                raise MoefyError(
                    f"{folder} has tensor names with {part!r}, which {whose} ({name}); {advice}"
                )


def class_names(family: Family, stored: Iterable[str]) -> dict[str, str]:
    """Stored name -> the name in the family's class.

    A checkpoint of the base class, as embedding models are published, lacks the model's own name
    before each, and transformers puts it there, too.
    """
    names = {name: family.named(name) for name in stored}
    prefix = family.layer.partition(".")[0] + "."
    inner, head = (
        layer_pattern(family.layer.removeprefix(prefix)),
        family.head.partition(".")[0] + ".",
    )
    named = any(name.startswith(prefix) for name in names.values())
    if named or not any(map(inner.match, names.values())):
        return names
    return {name: own if own.startswith(head) else prefix + own for name, own in names.items()}


def place_of_layers(family: Family, names: Iterable[str]) -> str | None:
    """What stands before the layers' numbers in names that the family does not have."""
    layers = family.layer.partition("{layer}")[0].split(".")[-2]
    found = (re.match(rf"(.*\.)?{layers}\.(?=[0-9]+\.)", name) for name in names)
    return next((match[0] for match in found if match), None)


def other_task(config: Mapping[str, Any], tasks: Iterable[str]) -> str | None:
    """Why a configuration's class is not for any of the tasks; None if it may be."""
    (name, *_) = architectures(config) or [""]
    if not HEAD.search(name) or name.endswith((*tasks, *SYNONYMS)):
        return None
    opens = " or ".join("AutoModel" + task.removeprefix("Model") for task in tasks)
    lacks = "predicts no next token" if "ForCausalLM" in tasks else "is for another task"
    return f"{name} {lacks}; expected a model that {opens} opens"


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names of a configuration's classes."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def layer_pattern(layer: str) -> re.Pattern[str]:
    """A pattern of names that begin with `layer`, which groups the number."""
    return re.compile(re.escape(layer).replace(r"\{layer\}", "([0-9]+)"))
