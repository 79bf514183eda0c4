"""Check and translate the names of a checkpoint's tensors and of its class."""

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
"""Name parts that no text model has: where each comes from, and what to do."""

HEAD = re.compile(r"(For[A-Z]\w*|RewardModel)$")
"""Endings of the names of classes with a head."""

SYNONYMS = ("ForConditionalGeneration", "ForPreTraining")
"""Endings that do not name the task."""


def check_names(folder: Path, names: Iterable[str]) -> None:
    """Check that no wrapper around the model has changed the names.

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
    """The name in the family's class of every stored name.

    In a checkpoint of the base class, as of embedding models, names lack the model's own prefix.
    transformers adds it, too.
    """
    names = {name: family.named(name) for name in stored}
    prefix = family.layer.partition(".")[0] + "."
    inner = layer_pattern(family.layer.removeprefix(prefix))
    head = family.head.partition(".")[0] + "."
    named = any(name.startswith(prefix) for name in names.values())
    if named or not any(map(inner.match, names.values())):
        return names
    return {name: own if own.startswith(head) else prefix + own for name, own in names.items()}


def place_of_layers(family: Family, names: Iterable[str]) -> str | None:
    """The prefix of the layers' numbers in names that the family does not have."""
    layers = family.layer.partition("{layer}")[0].split(".")[-2]
    matches = (re.match(rf"(.*\.)?{layers}\.(?=[0-9]+\.)", name) for name in names)
    return next((match[0] for match in matches if match), None)


def other_task(config: Mapping[str, Any], tasks: Iterable[str]) -> str | None:
    """Why a configuration's class has none of the tasks; None if it may have one."""
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
    """A pattern for names that begin with `layer`; its group is the number."""
    return re.compile(re.escape(layer).replace(r"\{layer\}", "([0-9]+)"))
