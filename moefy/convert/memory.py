"""How much memory a conversion takes, stage by stage.

Predictions add up what the stages hold at the same time, in the order in which they make it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from moefy.checkpoint.reload import fitting_layers
from moefy.compute_dtype import ComputeDtype, compute_dtype
from moefy.convert.prepare import SELF, Job
from moefy.convert.profile import CHUNK
from moefy.convert.refit import EXPERT_STRENGTHS
from moefy.convert.routed_ffn import GAINS
from moefy.files.buffers import CPU, Store
from moefy.files.shards import Slot
from moefy.memory import available, base_bytes, device_memory, host_room
from moefy.text.self_text import BATCHES, WriterSizes
from moefy.types import PIECE

SINGLE = re.compile(r"\.experts\.\d+\.")
"""In the names of what is stored expert by expert."""

ADVICE = {
    "attention": "lower --sequence-length or --tokens",
    "split": "lower --set partition.sample=2048 or --tokens",
    "refit": "--no-refit does without its matrix of all pairs of neurons",
    "reopen": "expected at least that for the model that is opened again",
    "gradients": "use another --partition",
    "vary": "lower --experts",
    "calibration": "give a --calibration FILE",
}
"""What to do where a stage takes too much."""


@dataclass(frozen=True)
class Place:
    """Where the calibration states are to lie."""

    where: Literal["device", "memory", "files"]  # "device" where it is a GPU
    keeps_activations: bool = True  # of all neurons; else they are computed again, chunk by chunk

    def store(self, folder: Path, device: torch.device) -> Store:
        """Allocates them; `folder` is for files."""
        return Store(
            folder if self.where == "files" else None,
            device if self.where == "device" else CPU,
            keeps_activations=self.keeps_activations,
        )


IN_MEMORY, IN_FILES = Place("memory"), Place("files")

PLACES = {
    # A CPU reads them from a file sooner than it computes them again, a GPU the other way round.
    "cpu": (IN_MEMORY, IN_FILES),
    "cuda": (
        Place("device"),
        Place("device", False),
        Place("memory", False),
        Place("files", False),
    ),
}
"""By kind of device: where states may lie, what is fast before what takes little memory."""


@dataclass(frozen=True)
class Plan:
    """Where the calibration states are to lie, and what that takes."""

    place: Place
    peak_bytes: int
    stage: str  # the stage that takes most
    file_bytes: int  # size of the files that hold the states; zero where memory does
    device_bytes: int = 0  # of a GPU's memory
    refusal: str = ""  # the error message where it does not fit


@dataclass(frozen=True)
class Writing:
    """How the dense model is to write text of its own."""

    compute: ComputeDtype
    batch_size: int  # documents at a time
    num_bytes: int  # memory that this takes

    @property
    def notes(self) -> list[str]:
        """What to say of its dtype."""
        return [f"calibration text: {self.compute.note}"] if self.compute.note else []


def state_bytes(job: Job) -> int:
    """Bytes on disk that let a stopped conversion go on, until the result is whole.

    Two generations of states between layers, and another being written.
    """
    return 3 * _saved_states(job) + gradient_bytes(job) + 8 * job.recipe.tokens


def _saved_states(job: Job) -> int:
    """Bytes of the states between two layers, the dense model's too where drift is made good."""
    sides = 2 if job.method.error_propagation else 1
    return 4 * job.recipe.tokens * job.size("hidden_size") * sides


def _gathered(job: Job) -> int:
    """Bytes of the states of all processes where they are brought together: parts and whole."""
    return 2 * _saved_states(job) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def gradient_bytes(job: Job) -> int:
    """Bytes of the gradients that a partition asks for."""
    count = job.recipe.tokens * job.size("hidden_size") * len(job.layers)
    return 2 * count if job.method.gradient else 0


def fit(job: Job, slots: Mapping[str, Slot], limit: int | None = None) -> Plan:
    """Where the states are to lie so that the conversion, which writes `slots`, keeps to `limit`
    bytes, to what there is, and to what a GPU has: the first of `PLACES` where they fit."""
    most, room = min(limit or host_room(), host_room()), device_memory(job.device)
    for place in PLACES[job.device.type]:
        stages, on_device = predicted(job, slots, place, most), device_bytes(job, place)
        stage = max(stages, key=stages.__getitem__)
        file_bytes = state_arrays(job, place) if place.where == "files" else 0
        plan = Plan(place, stages[stage], stage, file_bytes, on_device)
        if plan.peak_bytes <= most and on_device <= room:
            return plan
    even = ", even with its states in files," if plan.file_bytes else ""
    if plan.device_bytes > room:
        taken, limited, least = plan.device_bytes, f"{job.device} has", room
        kind, stage = "the GPU's memory", max(held := _layer(job), key=held.__getitem__)
    else:
        taken, limited, least, kind = plan.peak_bytes, "there are", most, "memory"
        limited = "--memory allows" if most == limit else limited
    refusal = (
        f"this conversion takes{even} {taken / 1e9:.1f} GB of {kind}, {limited} "
        f"{least / 1e9:.1f} GB; the most is for the stage {stage}: "
        + ADVICE.get(stage, "lower --tokens")
    )
    return dataclasses.replace(plan, refusal=refusal)


def device_bytes(job: Job, place: Place) -> int:
    """The most bytes of a GPU's memory that a layer takes; zero where there is none."""
    if job.device.type == "cpu":
        return 0
    return max(_layer(job).values()) + (state_arrays(job, place) if place.where == "device" else 0)


def state_arrays(job: Job, place: Place = IN_MEMORY) -> int:
    """Bytes of all that is held for every calibration token at a time."""
    tokens, hidden = job.recipe.tokens, job.size("hidden_size")
    # States, of the dense model too where drift is made good; the FFN's inputs; what its outputs
    # aim at, where they are written later. All neurons' activations.
    arrays = 4 if job.method.error_propagation else 3
    neurons = job.shape.num_neurons if place.keeps_activations else 0
    return 4 * tokens * (arrays * hidden + neurons)


def predicted(
    job: Job, slots: Mapping[str, Slot], place: Place = IN_MEMORY, most: int | None = None
) -> dict[str, int]:
    """The most resident bytes of every stage, on a machine that has `most`.

    The system can take back pages of mapped files whenever it needs them. They count only where
    they are read in whole (see `reopen`).
    """
    base = base_bytes(job.checkpoint.folder)
    always = base + gradient_bytes(job)
    # Each process counts as if it had all tokens in memory; else it holds what it gathers there.
    always += state_arrays(job, place) if place.where == "memory" else _gathered(job)
    if place.where == "device":  # a copy of the states, which is saved beside the next layer
        always += _saved_states(job)
    layer = _layer(job) if job.device.type == "cpu" else _written(job)
    stages = {stage: always + held for stage, held in layer.items()}
    # These need the whole dense model in memory.
    if job.recipe.calibration == SELF:
        stages["calibration"] = base + writing(job, most).num_bytes
    if job.method.gradient:
        hidden, length = job.size("hidden_size"), job.recipe.sequence_length
        way_back = 4 * length * job.num_layers * (16 * hidden + 4 * job.shape.num_neurons)
        way_back += 16 * length * job.size("vocab_size")
        stages["gradients"] = base + 4 * job.num_weights + way_back + gradient_bytes(job)
    stages["reopen"] = base + _reopened(job, slots)
    return stages


def _written(job: Job) -> dict[str, int]:
    """What one layer's stages hold outside of a GPU's memory, beside the states."""
    matrices = 4 * job.shape.num_neurons * job.size("hidden_size") * (3 if job.family.gated else 2)
    stored = int(matrices * job.shape.num_stored / job.shape.num_neurons)
    # The next layer is read meanwhile.
    return {"read": matrices, "attention": 4 * job.other_weights, "write": stored + matrices}


def _layer(job: Job) -> dict[str, int]:
    """What one layer's stages hold, beside the states."""
    recipe, shape, hidden = job.recipe, job.shape, job.size("hidden_size")
    neurons, experts, length = shape.num_neurons, shape.num_experts, recipe.sequence_length
    held_out = max(1, recipe.tokens // length // 8) * length
    fitted = recipe.tokens - held_out
    matrix = 4 * neurons * hidden
    ffn = matrix * (3 if job.family.gated else 2)
    chunk = 4 * min(CHUNK, recipe.tokens) * neurons
    # Weights of a layer outside its FFN, and the states they work on.
    rows = 4 * min(4 * length, recipe.tokens)
    stored = {"attention": ffn + 4 * job.other_weights + 8 * rows * hidden}
    # A gate's products, their activations, and the up's; with what the chunk before has left.
    stored["profile"] = ffn + 4 * chunk
    if (sample := job.method.sample) is None:
        energies = 4 * neurons * fitted
    else:
        energies = 4 * neurons * (min(fitted, sample) + min(held_out, sample // 4))
    routed = neurons - shape.num_shared
    # The scorer's Gram matrix in float32 and float64, its factor, and a copy to solve with.
    solve = 28 * hidden * hidden
    stored["split"] = ffn + energies + max(energies * routed // neurons + chunk, 2 * chunk + solve)
    gains = min(GAINS, min(CHUNK, recipe.tokens) * experts * hidden)
    stored["route"] = ffn + matrix + max(solve, 16 * gains + 3 * chunk)
    stored["route"] += 24 * recipe.tokens * experts
    if job.device.type != "cpu":
        stored["route"] += 4 * min(PIECE, recipe.tokens) * hidden
    if job.method.copies:
        # They are as many tensors to write, and before that new weights, if they are varied.
        times = 2.5 if job.method.noise or job.method.reinit else 0
        copies = ffn * shape.num_stored // neurons
        stored["vary"] = ffn + int(copies * (times + job.dtype.itemsize / 4))
    if recipe.refit:
        used = neurons if job.method.fit is not None else shape.num_active
        # The Gram matrix and its factor; what they are solved for, two solutions and the half of
        # one; down_proj of the first refit and of the one tried; the Gram matrix of the inputs.
        solving = 8 * used * used + 16 * used * hidden + 2 * matrix + 8 * hidden * hidden
        stored["refit"] = ffn + solving + 3 * chunk
    if job.method.polish:
        # Weights, gradients, both moments of Adam, and the best so far; a batch on its way back.
        stored["polish"] = 5 * ffn * max(shape.num_stored, neurons) // neurons + 8 * chunk
    if shape.overlaps and job.method.fit is not None:
        # What is left of the held-out outputs under each strength.
        left = 4 * held_out * hidden * len(EXPERT_STRENGTHS)
        # The FFN with each neuron once beside the one with copies, and two chunks of both.
        copies = (ffn + 2 * chunk) * shape.num_stored // neurons
        # Of the tokens of one expert, at twice the mean load: activations, those of the fitting
        # ones once more, and what the outputs miss.
        tokens = min(1.0, 2 * shape.experts_per_token / experts) * recipe.tokens
        own = int(4 * tokens * (2 * shape.expert_width + hidden))
        stored["refit of experts"] = ffn + matrix + left + chunk + copies + own
    return stored


def writing(job: Job, most: int | None = None) -> Writing:
    """How the dense model is to write its own text in `most` bytes, or in what there is: in a dtype
    that the machine has, and as many documents at a time as fit.

    Raises:
        MoefyError: code 5 where a dtype that was asked for does not fit.
    """
    room = min(most or available(), available()) - base_bytes(job.checkpoint.folder)
    sizes = WriterSizes(job.checkpoint.entries.values(), job.dense.config, job.num_layers)
    compute = compute_dtype(
        job.recipe.compute_dtype,
        job.stored_dtype,
        job.device,
        float32_bytes=sizes.num_bytes(4, BATCHES[-1]),
        room=room,
    )
    size = compute.dtype.itemsize
    batch_size = sizes.batch_size(size, room)
    return Writing(compute, batch_size, sizes.num_bytes(size, batch_size))


def _reopened(job: Job, slots: Mapping[str, Slot]) -> int:
    """What reopening the result holds: its files, and weights that are no view of a file.

    Weights that keep their dtype are such a view. Single experts are copied into one tensor.
    """
    layer = job.target.prefix + job.family.layer
    layers, in_float32 = fitting_layers(slots, job.num_layers, layer)
    later = tuple(layer.format(layer=number) for number in range(layers, job.num_layers))
    num_bytes = 0
    for name, slot in slots.items():
        if name.startswith(later):
            continue
        num_bytes += slot.num_bytes
        if in_float32 and slot.dtype != "F32":
            num_bytes += 4 * math.prod(slot.shape)
        elif SINGLE.search(name):
            num_bytes += slot.num_bytes
    return num_bytes
