"""What a fine-tune will take, before it starts: tokens, steps, time, memory and disk."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefy.config.finetune import Settings
from moefy.config.presets import CHOSEN, OPEN, PRESETS, rate_scale, round_tokens, step_tokens
from moefy.config.sources import sources
from moefy.convert.memory import available, base_bytes
from moefy.errors import MoefyError
from moefy.files.safetensors_header import read_entries
from moefy.finetune import losses
from moefy.finetune.checkpoints import NUM_KEPT
from moefy.finetune.inputs import ComputeDtypes, Run, num_weights
from moefy.finetune.probe import Probe
from moefy.finetune.train import MEASUREMENTS, device, num_steps, tokens_per_step
from moefy.models.load import plain_config

DECODING = 2.0
"""Seconds of a token that the dense model writes, in those of one that it reads. SmolLM2-135M in
float32 on AVX2 wrote 89 a second, 24 texts at a time, and read 177."""

RECOMPUTED = 1.25
"""Time of a step with gradient checkpointing over that of one without. Measured: 1.24 without the
teacher's share (recipes/results/memory-and-time.md)."""

KEPT = 400
"""Bytes of a token in the cache of the teacher's predictions."""

REOPENED = 3 * 10**9
"""Most bytes of weights that are opened again to compare."""

BATCH = {"cpu": 4, "cuda": 32}
"""Sequences of a forward pass at most, where a preset chooses."""


@dataclass(frozen=True)
class Inputs:
    """What an estimate reads."""

    run: Run
    teacher: Path | None
    settings: Settings
    dtypes: ComputeDtypes
    probe: Probe
    world: int = 1

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


def settled(inputs: Inputs) -> Settings:
    """The settings with what their preset chooses, by the width of the model and its speed here.

    Tokens are as many as the preset has time for, rounded down to 1, 2 or 5 and zeros.
    """
    asked = inputs.settings
    if not any(getattr(asked, name) == OPEN for name in CHOSEN):
        return asked
    scale = rate_scale(plain_config(inputs.run.folder).get_text_config().hidden_size)
    default = Settings()
    rates = {name: getattr(default, name) * scale for name in CHOSEN if name.endswith("rate")}
    tokens = asked.tokens
    if tokens == OPEN:
        # Sizes of steps decide the time, and the time decides the sizes: twice is enough.
        tokens = 0
        for _ in range(2):
            tried = _batched(inputs, tokens)
            fixed, per_token = _seconds(dataclasses.replace(inputs, settings=tried))
            tokens = round_tokens((PRESETS[asked.preset] - fixed) / per_token)
        tokens = max(tokens, 8 * asked.sequence_length)
    rates = {name: value for name, value in rates.items() if getattr(asked, name) == OPEN}
    settings = dataclasses.replace(_batched(inputs, tokens), **rates)
    both = asked.batch_size == asked.gradient_accumulation_steps == OPEN
    while both and settings.batch_size > 1 and not _fits(inputs, settings):
        settings = dataclasses.replace(
            settings,
            batch_size=settings.batch_size // 2,
            gradient_accumulation_steps=2 * settings.gradient_accumulation_steps,
        )
    return settings


def _fits(inputs: Inputs, settings: Settings) -> bool:
    tried = dataclasses.replace(inputs, settings=settings)
    return max(memory(tried).values()) <= available() and _gpu_bytes(tried) <= _gpu_room(tried)


def _batched(inputs: Inputs, tokens: int) -> Settings:
    """The settings with batches for so many tokens."""
    settings = dataclasses.replace(inputs.settings, tokens=max(1, tokens))
    rows = max(1, step_tokens(tokens) // settings.sequence_length // inputs.world)
    times = settings.gradient_accumulation_steps
    batch = settings.batch_size
    if batch == OPEN:
        batch = max(1, min(BATCH[inputs.place.type], rows // max(1, times)))
    if times == OPEN:
        times = max(1, rows // batch)
    return dataclasses.replace(settings, batch_size=batch, gradient_accumulation_steps=times)


def estimate(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Tokens, steps, time, memory and disk of a fine-tune to `out`; `refusal` says what does not
    fit, and is empty where all does."""
    settings, probe = inputs.settings, inputs.probe
    steps = num_steps(settings, inputs.world)
    tokens = steps * tokens_per_step(settings, inputs.world)
    fixed, per_token = _seconds(inputs)
    stages = memory(inputs)
    stage = max(stages, key=stages.__getitem__)
    gpu = _gpu_bytes(inputs)
    trained = int(probe.student.num_trained)
    file_bytes = sum(entry.num_bytes for entry in read_entries(inputs.run.folder).values())
    checkpoint = trained * (inputs.dtypes.student.dtype.itemsize + 12)
    until = file_bytes + (NUM_KEPT + 2) * checkpoint  # the best one, and one that is being written
    if settings.teacher_cache:
        until += KEPT * (tokens + settings.validation_tokens)
    plan = {
        "run": str(inputs.run.folder),
        "text": [f"{s.place} ({s.share:.0%})" for s in sources(settings.data, settings.answers)],
        "settings": dataclasses.asdict(settings),
        "train": settings.train,
        "parameters_trained": trained,
        "tokens": tokens,
        "steps": steps,
        "tokens_per_step": tokens_per_step(settings, inputs.world),
        "seconds": round(fixed + per_token * tokens, 1),
        "tokens_per_second": round(1 / per_token, 1),
        "memory_bytes": stages[stage],
        "memory_stage": stage,
        "gpu_memory_bytes": gpu,
        "disk_bytes": file_bytes,
        "state_bytes": until,
        "notes": [
            note for note in (inputs.dtypes.student.note, inputs.dtypes.teacher.note) if note
        ],
    }
    return plan | {"refusal": _refusal(inputs, plan, out)}


def check(plan: Mapping[str, Any]) -> None:
    """Refuse a fine-tune that does not fit.

    Raises:
        MoefyError: code 5.
    """
    if plan["refusal"]:
        raise MoefyError(plan["refusal"], code=5)


def _seconds(inputs: Inputs) -> tuple[float, float]:
    """Seconds before and after the training, and those for a token of it."""
    settings, student = inputs.settings, inputs.probe.student
    asked = inputs.probe.teacher.compute_seconds
    compute = student.compute_seconds
    compute *= RECOMPUTED if settings.gradient_checkpointing else 1
    per_token = compute / inputs.world
    per_token += student.update_seconds / tokens_per_step(settings, inputs.world)
    # A forward pass is a third of a step's. The validation text is measured before and after, too.
    every, steps = settings.measure_every, num_steps(settings, inputs.world)
    times = 2 + (min(steps, MEASUREMENTS) if every is None else steps // every if every else 0)
    fixed = settings.validation_tokens * times * compute / 3
    if inputs.distils:
        fixed += settings.validation_tokens * asked * (times if inputs.live else 1)
        per_token += asked / (inputs.world if inputs.live else 1)  # one process fills a cache
    own = [source for source in sources(settings.data, settings.answers) if source.place == "self"]
    per_token += DECODING * asked * sum(source.share for source in own)
    return fixed, per_token


def memory(inputs: Inputs) -> dict[str, int]:
    """The most resident bytes of every stage; on a GPU without what lies there."""
    settings = inputs.settings
    base = base_bytes(inputs.run.folder)
    weights = num_weights(inputs.run.folder)
    stages = {"write": base + 4 * weights + min(REOPENED, 4 * weights)}
    if inputs.place.type == "cuda":
        return stages
    held, training, update = _training(inputs)
    stages["train"] = base + held + training + update
    if inputs.teacher:
        own = num_weights(inputs.teacher) * inputs.dtypes.teacher.dtype.itemsize
        stages["teacher"] = base + own + _asking(inputs)
    if settings.teacher_cache and inputs.teacher:
        tokens = settings.tokens + settings.validation_tokens
        stages["teacher"] += 3 * KEPT * tokens  # its rows, then joined, then written
    return stages


def _gpu_bytes(inputs: Inputs) -> int:
    """Bytes of the GPU's memory, where it trains there."""
    held, training, update = _training(inputs)
    if inputs.place.type != "cuda":
        return 0
    gradients = int(inputs.probe.student.num_trained) * inputs.dtypes.student.dtype.itemsize
    return held + max(training, gradients + update)


def _gpu_room(inputs: Inputs) -> int:
    if inputs.place.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(inputs.place).total_memory


def _training(inputs: Inputs) -> tuple[int, int, int]:
    """Bytes that are held while training; more on the way there and back; more for an update.

    The two are not held at once, but the allocator of a CPU keeps much of the first for itself.
    """
    settings, student, run = inputs.settings, inputs.probe.student, inputs.run
    size = inputs.dtypes.student.dtype.itemsize
    trained, tokens = int(student.num_trained), settings.batch_size * settings.sequence_length
    parts = max(1, settings.fsdp)
    held = num_weights(run.folder) * size // parts
    # Two moments, and copies in float32 of weights that are not.
    held += trained * (8 if size == 4 else 12) // parts
    if inputs.teacher and inputs.live:
        held += num_weights(inputs.teacher) * inputs.dtypes.teacher.dtype.itemsize
    saved = student.saved_bytes
    if settings.gradient_checkpointing:
        config = plain_config(run.folder).get_text_config()
        layers, layer = config.num_hidden_layers, inputs.probe.layer_bytes
        saved += layer + layers * (config.hidden_size * size - layer)
    # The gradients of the logits: in float32 that of the logarithm and of what is picked, then
    # their sum as the model computes; or the teacher's logits, which come before them.
    logits = run.vocab_size * (8 + size)
    if inputs.live:
        logits = max(logits, _asking(inputs) // tokens)
    training = int(tokens * (saved + logits)) + trained * size // parts
    update = trained * (0 if size == 4 else 4) // parts  # gradients in float32
    return held, training, update


def _asking(inputs: Inputs) -> int:
    """Bytes of the teacher's logits: as computed, in float32, and divided by the temperature."""
    tokens = inputs.settings.batch_size * inputs.settings.sequence_length
    return tokens * inputs.run.vocab_size * (inputs.dtypes.teacher.dtype.itemsize + 8)


def _refusal(inputs: Inputs, plan: Mapping[str, Any], out: Path) -> str:
    """What does not fit, and what to lower; empty where all fits."""
    settings = inputs.settings
    lower = [
        "--train lora" * (settings.train not in ("lora", "router")),
        "--teacher-cache DIR" * inputs.live,
        "--gradient-checkpointing" * (not settings.gradient_checkpointing),
        "a smaller --batch-size with more --gradient-accumulation-steps"
        * (settings.batch_size > 1),
        "a smaller --sequence-length",
    ]
    advice = "; expected less: " + ", ".join(filter(None, lower))
    needed, room = plan["gpu_memory_bytes"], _gpu_room(inputs)
    if needed > room:
        return f"{_takes(needed, 'memory of the GPU', room)}{advice}"
    room = available()
    if plan["memory_bytes"] > room:
        if plan["memory_stage"] == "write":
            advice = "; expected as much, to compare what was written"
        return f"{_takes(plan['memory_bytes'], 'memory', room)}{advice}"
    free = shutil.disk_usage(next(p for p in [out, *out.parents] if p.exists())).free
    if (needed := plan["disk_bytes"] + plan["state_bytes"]) > free:
        place = f"free at {out.parent}"
        return f"{_takes(needed, 'disk', free, place)}; expected more room, or --train lora"
    return ""


def _takes(needed: float, what: str, room: float, where: str = "") -> str:
    gigabytes = math.ceil(needed / 1e8) / 10
    there = f"there are {room / 1e9:.1f} GB {where}".rstrip()
    return f"this fine-tune takes {gigabytes:.1f} GB of {what}, {there}"
