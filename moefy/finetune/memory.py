"""The memory that a fine-tune takes, stage by stage."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from moefy.config.finetune import Settings
from moefy.finetune import losses, refit_after
from moefy.finetune.inputs import ComputeDtypes, Run, num_weights
from moefy.finetune.probe import Probe
from moefy.finetune.train import device
from moefy.memory import base_bytes
from moefy.models.load import plain_config

KEPT = 400
"""Bytes of a token in the cache of the teacher's predictions."""

REOPENED = 3 * 10**9
"""Most bytes of weights that are opened again to compare."""


@dataclass(frozen=True)
class Inputs:
    """What an estimate reads."""

    run: Run
    teacher: Path | None
    settings: Settings
    dtypes: ComputeDtypes
    probe: Probe
    world: int = 1
    answers: bool = False
    """Whether the teacher can answer the prompts of a last stage."""

    @property
    def distils(self) -> bool:
        """Whether a loss needs the teacher."""
        return losses.distils(self.settings)

    @property
    def live(self) -> bool:
        """Whether the teacher runs beside the student."""
        return self.distils and not self.settings.teacher_cache

    @property
    def place(self) -> torch.device:
        """Where it trains."""
        return device(self.settings)


def memory(inputs: Inputs) -> dict[str, int]:
    """The most resident bytes of every stage; on a GPU without what lies there."""
    settings = inputs.settings
    base = base_bytes(inputs.run.folder)
    stages = {"write": written(inputs.run)}
    host, device = _refit(inputs)
    stages["refit"] = base + host
    if inputs.place.type == "cuda":
        return stages
    held, way_back, update = training(inputs)
    stages["train"] = base + held + way_back + update
    # What the allocator of a CPU keeps of the way back, and the teacher, are still there.
    stages["write"] += way_back + (_teacher(inputs) if inputs.live else 0)
    stages["refit"] += device
    if inputs.teacher:
        stages["teacher"] = base + _teacher(inputs) + _asking(inputs)
    if settings.teacher_cache and inputs.teacher:
        tokens = settings.tokens + settings.validation_tokens
        stages["teacher"] += 3 * KEPT * tokens  # its rows, then joined, then written
    return stages


def written(run: Run) -> int:
    """The least bytes that writing takes: the trained weights in float32, and the written ones."""
    weights = 4 * num_weights(run.folder)
    return base_bytes(run.folder) + weights + min(REOPENED, weights)


def gpu_bytes(inputs: Inputs) -> int:
    """Bytes of the GPU's memory, where it trains there."""
    held, way_back, update = training(inputs)
    if inputs.place.type != "cuda":
        return 0
    gradients = int(inputs.probe.student.num_trained) * inputs.dtypes.student.dtype.itemsize
    return max(held + max(way_back, gradients + update), _refit(inputs)[1])


def gpu_room(inputs: Inputs) -> int:
    """Bytes that the GPU has; 0 without one."""
    if inputs.place.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(inputs.place).total_memory


def training(inputs: Inputs) -> tuple[int, int, int]:
    """Bytes that are held while training; more on the way there and back; more for an update.

    The two are not held at once, but the allocator of a CPU keeps much of the first for itself.
    """
    settings, student, run = inputs.settings, inputs.probe.student, inputs.run
    size = inputs.dtypes.student.dtype.itemsize
    trained, tokens = int(student.num_trained), settings.batch_size * settings.sequence_length
    parts = max(1, settings.fsdp)
    held = num_weights(run.folder) * size // parts
    held += trained * state_bytes(inputs) // parts
    held += _teacher(inputs) if inputs.live else 0
    if settings.anneal:  # what is blended in, in float32
        held += 4 * len(run.summary["layers"]) * run.summary["shape"]["num_neurons"] * _hidden(run)
    saved = student.saved_bytes
    if settings.gradient_checkpointing:
        layers = plain_config(run.folder).get_text_config().num_hidden_layers
        layer = inputs.probe.layer_bytes
        saved += layer + layers * (_hidden(run) * size - layer)
    # The gradients of the logits: in float32 that of the logarithm and of what is picked, then
    # their sum as the model computes; or the teacher's logits, which come before them.
    logits = run.vocab_size * (8 + size)
    if inputs.live:
        logits = max(logits, _asking(inputs) // tokens)
    way_back = int(tokens * (saved + logits)) + trained * size // parts
    update = trained * (0 if size == 4 else 4) // parts  # gradients in float32, at most
    return held, way_back, update


def state_bytes(inputs: Inputs) -> int:
    """Of a weight: two moments, and a copy in float32 of one that is not."""
    moments = 8 if inputs.settings.optimizer == "adamw" else 2
    return moments + (0 if inputs.dtypes.student.dtype.itemsize == 4 else 4)


def eight_bits() -> bool:
    """Whether the package of the 8-bit optimizer is here."""
    return importlib.util.find_spec("torchao") is not None


def _refit(inputs: Inputs) -> tuple[int, int]:
    """Bytes that a refit after the training holds: outside of the device, and on it."""
    settings, run, dense = inputs.settings, inputs.run, inputs.teacher
    if not settings.refit_after or not dense:
        return 0, 0
    size, shape, hidden = inputs.dtypes.student.dtype.itemsize, run.summary["shape"], _hidden(run)
    tokens, neurons = min(refit_after.TOKENS, settings.tokens), shape["num_neurons"]
    teacher = _teacher(inputs)
    weights = num_weights(run.folder) * size
    # The trained weights again, and what leaves the dense model's layers.
    states = len(run.summary["layers"]) * tokens * hidden * inputs.dtypes.teacher.dtype.itemsize
    # All neurons' answers, those that run, and both scaled; inputs and outputs of a layer. The Gram
    # matrix and its factor, and what they are solved for.
    answers = 4 * tokens * (3 * neurons + 6 * hidden)
    solving = 8 * neurons * neurons + 24 * neurons * hidden
    return weights + states, weights + teacher * (1 + inputs.live) + answers + solving


def _teacher(inputs: Inputs) -> int:
    """Bytes of the dense model's weights."""
    if not inputs.teacher:
        return 0
    return num_weights(inputs.teacher) * inputs.dtypes.teacher.dtype.itemsize


def _hidden(run: Run) -> int:
    return plain_config(run.folder).get_text_config().hidden_size


def _asking(inputs: Inputs) -> int:
    """Bytes of the teacher's logits: as computed, in float32, and divided by the temperature."""
    tokens = inputs.settings.batch_size * inputs.settings.sequence_length
    return tokens * inputs.run.vocab_size * (inputs.dtypes.teacher.dtype.itemsize + 8)
