"""What a fine-tune will take, before it starts: tokens, steps, time, memory and disk."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefy.config.finetune import Settings
from moefy.config.presets import (
    CHOSEN,
    OPEN,
    PRESETS,
    last_share,
    round_tokens,
    step_tokens,
)
from moefy.config.sources import sources
from moefy.errors import MoefyError
from moefy.files.safetensors_header import read_entries
from moefy.finetune.answers import read_prompts
from moefy.finetune.checkpoints import NUM_KEPT
from moefy.finetune.last_stage import ANSWER, SOURCE, num_prompts
from moefy.finetune.memory import (
    KEPT,
    Inputs,
    eight_bits,
    gpu_bytes,
    gpu_room,
    memory,
    state_bytes,
    written,
)
from moefy.finetune.train import (
    MEASUREMENTS,
    num_last_steps,
    num_steps,
    tokens_per_step,
)
from moefy.memory import host_room

DECODING = 2.0
"""Seconds of a token that the dense model writes, in those of one that it reads. SmolLM2-135M in
float32 on AVX2 wrote 89 a second, 24 texts at a time, and read 177."""

RECOMPUTED = 1.25
"""Time of a step with gradient checkpointing over that of one without. Measured: 1.24 without the
teacher's share (recipes/results/memory-and-time.md)."""

BATCH = {"cpu": 4, "cuda": 32}
"""Sequences of a forward pass at most, where a preset chooses."""


ADVICE = {
    "refit": "; expected refit_after=false",
    "teacher": "; expected fewer --tokens, or no --teacher-cache",
}
"""What to do where a stage beside the training takes too much."""


def settled(inputs: Inputs) -> Settings:
    """The settings with what their preset chooses, by the model's speed here.

    Tokens are as many as the preset has time for, but no more than four passes over the text, which
    are almost worth as much new text where more are not; rounded down to 1, 2 or 5 and zeros.

    Source: Muennighoff et al., 2023, arXiv:2305.16264.
    """
    asked = inputs.settings
    if not any(getattr(asked, name) == OPEN for name in CHOSEN):
        return asked
    tokens = asked.tokens
    if tokens == OPEN:
        # Sizes of steps decide the time, and the time decides the sizes: twice is enough.
        tokens = 0
        for _ in range(2):
            tried = _batched(inputs, tokens)
            fixed, per_token = _seconds(dataclasses.replace(inputs, settings=tried))
            timed = (PRESETS[asked.preset] - fixed) / per_token
            tokens = round_tokens(min(timed, most_tokens(asked)))
        tokens = max(tokens, 8 * asked.sequence_length)
    settings = _batched(inputs, tokens)
    both = asked.batch_size == asked.gradient_accumulation_steps == OPEN
    while both and settings.batch_size > 1 and not _fits(inputs, settings):
        settings = dataclasses.replace(
            settings,
            batch_size=settings.batch_size // 2,
            gradient_accumulation_steps=2 * settings.gradient_accumulation_steps,
        )
    return settings


def most_tokens(settings: Settings) -> float:
    """Tokens of about four passes over the text at the shares that are asked for; without end where
    none of it is read from here.

    A byte of a file is about a quarter of a token, and an answer about a quarter of the longest.
    """
    amounts = []
    for source in sources(settings.data, settings.answers):
        path = Path(source.place).expanduser()
        if source.prompts:
            amount = len(read_prompts(path)) * settings.answer_tokens
        elif source.place == "self" or not path.exists():
            continue
        else:
            files = [path] if path.is_file() else filter(Path.is_file, path.rglob("*"))
            amount = sum(file.stat().st_size for file in files)
        amounts.append(amount / source.share)
    return min(amounts, default=math.inf)


def _fits(inputs: Inputs, settings: Settings) -> bool:
    tried = dataclasses.replace(inputs, settings=settings)
    return max(memory(tried).values()) <= host_room() and gpu_bytes(tried) <= gpu_room(tried)


def _batched(inputs: Inputs, tokens: int) -> Settings:
    """The settings with batches, and a last stage, for so many tokens."""
    settings = dataclasses.replace(inputs.settings, tokens=max(1, tokens))
    rows = max(1, step_tokens(tokens) // settings.sequence_length // inputs.world)
    times = settings.gradient_accumulation_steps
    batch = settings.batch_size
    if batch == OPEN:
        batch = max(1, min(BATCH[inputs.place.type], rows // max(1, times)))
    if times == OPEN:
        times = max(1, rows // batch)
    last = settings.last_stage
    if last == OPEN:
        last = last_share(tokens) if inputs.answers else 0.0
    return dataclasses.replace(
        settings, batch_size=batch, gradient_accumulation_steps=times, last_stage=last
    )


def estimate(inputs: Inputs, out: Path) -> dict[str, Any]:
    """Tokens, steps, time, memory and disk of a fine-tune to `out`; `refusal` says what does not
    fit, and is empty where all does."""
    settings, probe = inputs.settings, inputs.probe
    steps = num_steps(settings, inputs.world)
    tokens = steps * tokens_per_step(settings, inputs.world)
    fixed, per_token = _seconds(inputs)
    last = num_last_steps(settings, inputs.world)
    stages = memory(inputs)
    stage = max(stages, key=stages.__getitem__)
    gpu = gpu_bytes(inputs)
    trained = int(probe.student.num_trained)
    file_bytes = sum(entry.num_bytes for entry in read_entries(inputs.run.folder).values())
    checkpoint = trained * (inputs.dtypes.student.dtype.itemsize + state_bytes(inputs))
    until = file_bytes + (NUM_KEPT + 2) * checkpoint  # the best one, and one that is being written
    if settings.teacher_cache:
        until += KEPT * (tokens + settings.validation_tokens)
    plan = {
        "run": str(inputs.run.folder),
        "text": [
            *(f"{s.place} ({s.share:.0%})" for s in sources(settings.data, settings.answers)),
            *([f"{SOURCE} (the last {last / steps:.1%} of the steps)"] if last else []),
        ],
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
    last = num_last_steps(settings, inputs.world) * tokens_per_step(settings, inputs.world)
    fixed += DECODING * asked * num_prompts(last) * ANSWER
    return fixed, per_token


def _refusal(inputs: Inputs, plan: Mapping[str, Any], out: Path) -> str:
    """What does not fit, and what to lower; empty where all fits."""
    settings = inputs.settings
    lower = [
        "--train lora" * (settings.train not in ("lora", "router")),
        "--optimizer adamw-8bit"
        * (settings.optimizer == "adamw" and not settings.fsdp and eight_bits()),
        "--teacher-cache DIR" * inputs.live,
        "--gradient-checkpointing" * (not settings.gradient_checkpointing),
        "a smaller --batch-size with more --gradient-accumulation-steps"
        * (settings.batch_size > 1),
        "a smaller --sequence-length",
    ]
    advice = "; expected less: " + ", ".join(filter(None, lower))
    needed, room = plan["gpu_memory_bytes"], gpu_room(inputs)
    if needed > room:
        return f"{_takes(needed, 'memory of the GPU', room)}{advice}"
    room = host_room()
    if plan["memory_bytes"] > room:
        if written(inputs.run) > room:
            advice = "; expected as much, to compare what was written"
        else:
            advice = ADVICE.get(plan["memory_stage"], advice)
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
