"""What a conversion will do, decided from headers and configuration before a weight is read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import reduce

import torch

from moefy.checkpoint.cut import num_parameters, without
from moefy.checkpoint.model_config import model_config
from moefy.checkpoint.tensors import Checkpoint
from moefy.config.layer_names import chosen_layers
from moefy.config.recipe import TOKENS, Recipe
from moefy.convert.choose import (
    choose_shape,
    choose_target,
    describe,
    why_all_layers,
)
from moefy.convert.ffn import Method
from moefy.convert.source import Source, depth_of, read_source
from moefy.convert.stages import stages
from moefy.errors import MoefyError
from moefy.files.shards import DTYPES
from moefy.models.choice import layer_sizes
from moefy.models.engines import ENGINES, by_reason, engine_issues
from moefy.models.families.family import Family
from moefy.models.shape import pruned
from moefy.models.targets.dense import narrower
from moefy.models.targets.target import Dense, Target
from moefy.types import Shape

AUTO = "auto"  # what `--layers` says to keep those dense that would lose most
SELF = "self"  # what `--calibration` says to have the model write the text


@dataclass(frozen=True)
class Job:
    """A conversion whose every question has been answered, before a weight is read."""

    recipe: Recipe
    source: Source
    checkpoint: Checkpoint  # the source's, less the layers that are dropped
    dropped: tuple[int, ...]  # these, by their numbers in the source
    dense: Dense
    target: Target
    reason: str  # why this target
    active: float  # fraction of the layers that are left, where the recipe's is of all
    shape: Shape
    layers: list[int]
    weighs: bool  # whether sensitivities, which are not measured yet, say which layers these are
    method: Method
    notes: tuple[str, ...]

    @property
    def family(self) -> Family:
        """The family of the dense checkpoint."""
        return self.source.family

    def size(self, key: str) -> int:
        """A whole number of the dense configuration, which validation has checked."""
        return int(self.checkpoint.config[key])  # pyright: ignore[reportArgumentType]

    @property
    def num_layers(self) -> int:
        """L."""
        return self.size("num_hidden_layers")

    @property
    def kept(self) -> list[int]:
        """The numbers of the layers in the dense model."""
        every = range(self.num_layers + len(self.dropped))
        return [layer for layer in every if layer not in self.dropped]

    @property
    def task(self) -> str:
        """What the model is for (see `Family`)."""
        return self.family.task(self.checkpoint.config)

    @property
    def num_weights(self) -> int:
        """Weights of the dense model."""
        return num_parameters(self.source.checkpoint)

    @property
    def other_weights(self) -> int:
        """Weights of the first layer outside its FFN."""
        return layer_sizes(
            self.family, self.checkpoint.config, self.checkpoint.entries
        ).other_weights

    @property
    def ffn_names(self) -> dict[str, int]:
        """The tensors of the FFNs that are converted, and the layers that they are in."""
        return {name: layer for layer in self.layers for name in self.family.ffn_names(layer)}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the FFN and router tensors that are written."""
        if self.recipe.dtype != "as-stored":
            return getattr(torch, self.recipe.dtype)
        return self.stored_dtype

    @property
    def num_shadow(self) -> int:
        """Neurons of each expert that are stored again as its backup."""
        return round(self.recipe.shadow * self.shape.expert_width)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the FFNs that are converted: of several, the one that holds all values."""
        codes = sorted({self.checkpoint.entries[name].dtype for name in self.ffn_names})
        return reduce(torch.promote_types, [DTYPES[code] for code in codes])

    @property
    def device(self) -> torch.device:
        """Where layers are computed."""
        return device_of(self.recipe.device)


def prepare(recipe: Recipe, *, control: bool = False, source: Source | None = None) -> Job:
    """Answer from headers and configuration alone whether and how `recipe` can be run.

    `control` admits routers that evaluation uses and that cannot be written. `source` is the
    recipe's model, where another job has read it.

    Raises:
        MoefyError: code 2 for options that cannot be, 3 for a broken and 4 for an unsupported
            checkpoint, 5 for a device that is not there.
    """
    method = stages(recipe, control=control)
    default = TOKENS[device_of(recipe.device).type]
    tokens = recipe.tokens or max(default, 8 * recipe.sequence_length)
    recipe = dataclasses.replace(recipe, tokens=tokens)
    source = source or read_source(recipe)
    family, notes = source.family, list(source.notes)
    dropped, active = depth_of(recipe, source, method)
    checkpoint = without(source.checkpoint, family, dropped)
    # "auto" is settled from weights (see `sensitivity`); until then, or if it need not be measured,
    # it stands for all.
    weighs = recipe.layers == AUTO
    if weighs:
        why_all = why_all_layers(recipe, method, family, checkpoint, active)
        weighs = why_all is None
        notes += [f"all layers are converted: {why_all}"] if why_all else []
    chosen = chosen_layers(":" if recipe.layers == AUTO else recipe.layers, source.num_layers)
    kept = [layer for layer in range(source.num_layers) if layer not in dropped]
    if not (layers := [new for new, layer in enumerate(kept) if layer in chosen]):
        named = f"--layers {recipe.layers} names only layers that are dropped"
        raise MoefyError(f"{named} (--drop-layers {recipe.drop_layers}); name others", code=2)
    dense = describe(checkpoint, family, layers)
    target, reason = narrower(family), "the dense class itself, for it routes nothing"
    if method.fit is not None:
        target, reason = choose_target(recipe, family, dense)
    if recipe.shadow and (method.fit is None or not target.native):
        raise MoefyError(
            f"--shadow {recipe.shadow:g} needs moefy's own class, and this would be written as "
            f"{target.model_type or 'a dense class'}; expected --target moefy, or no --shadow",
            code=2,
        )
    _check_writes(recipe, method, family)
    shape, choice = choose_shape(recipe, method, checkpoint, dense, target, active)
    if family.beside:
        notes.append(f"{family.beside} stays dense")
    if method.fit is None and (len(layers) < len(kept) or family.beside):
        left = family.beside or f"all but --layers {recipe.layers}"
        raise MoefyError(
            f"--partition {recipe.partition}: a dense class has one FFN width, and {left} would "
            "stay as wide as before; expected another partition",
            code=2,
        )
    kinds = model_config(source.checkpoint).to_dict().get("layer_types") or []
    if dropped and len(set(kinds)) > 1:
        notes.append(
            "the kinds of the layers (layer_types) no longer alternate as they did: an engine that "
            "tells them by a layer's number computes something else"
        )
    if weighs:
        notes += ("which layers stay dense is measured first; until then all count as converted",)
    if method.fit is None:
        shape = pruned(shape)
    else:
        notes += [str(choice)] if choice else []
        notes += serving_notes(target, dense, shape)
    if method.copies:
        times = (
            f"a converted FFN computes {shape.active_fraction:.2f} times as much as the dense one"
        )
        stored = f"and holds {shape.num_stored / shape.num_neurons:.2f} times as much"
        notes.append(f"{times} {stored}: copies are a start for training (moefy finetune)")
        if shape.experts_per_token == 1:
            notes.append(
                "the gate of a single copy is always one, so that routers learn balance alone"
            )
    job = Job(
        recipe,
        source,
        checkpoint,
        dropped,
        dense,
        target,
        reason,
        active,
        shape,
        layers,
        weighs,
        method,
        (),
    )
    counts = Counter(entry.dtype for entry in checkpoint.entries.values())
    if recipe.dtype == "as-stored" and len(counts) > 1:
        stored = ", ".join(f"{number} {code}" for code, number in sorted(counts.items()))
        dtype = str(job.dtype).removeprefix("torch.")
        notes.append(f"{stored} tensors keep their dtypes; converted FFNs are written in {dtype}")
    return dataclasses.replace(job, notes=tuple(notes))


def _check_writes(recipe: Recipe, method: Method, family: Family) -> None:
    """Refuse options that need a model to predict the next token, where it does not."""
    if "ForCausalLM" in family.tasks:
        return
    if recipe.calibration == SELF:
        lacks, do = "cannot write its own calibration text", "give one: --calibration FILE"
    elif method.gradient:
        lacks, do = "has no next-token loss to take gradients of", "use another --partition"
    else:
        return
    raise MoefyError(f"{family.model_type} {lacks}; {do}", code=2)


def serving_notes(target: Target, dense: Dense, shape: Shape) -> list[str]:
    """What the engines do wrong with the result, and what slows it down."""
    issues = by_reason(engine_issues(target.model_type, dense, shape))
    notes = [f"{engines}: {reason}" for reason, engines in issues.items()]
    if dense.rope_type == "longrope":
        length = dense.config.get("original_max_position_embeddings", "the original length")
        notes.append(f"text that grows past {length} tokens keeps keys rotated for short text")
    known = [engine for engine in ENGINES if target.model_type in engine.classes]
    slow = by_reason({engine.name: engine.warnings(dense, shape) for engine in known})
    return notes + [f"{engines}: {reason}" for reason, engines in slow.items()]


def device_of(name: str) -> torch.device:
    """The device that `--device` names: `auto` is the GPU if there is one, else the processor.

    Raises:
        MoefyError: as `check_device`.
    """
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def check_device(name: str) -> None:
    """Refuse a `--device` that is none, or that this machine does not have.

    Raises:
        MoefyError: code 2 for a name that is none, 5 for a device that is not there.
    """
    kind, _, number = name.partition(":")
    if name in ("auto", "cpu"):
        return
    if kind != "cuda" or not (number or "0").isdecimal():
        raise MoefyError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:1", code=2)
    if int(number or 0) >= (count := torch.cuda.device_count()):
        raise MoefyError(f"--device {name}: {count} CUDA devices found; expected more", code=5)
