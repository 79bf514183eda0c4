"""What a conversion will take and give, from headers and configuration alone."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefy.checkpoint.cut import num_parameters
from moefy.config.recipe import Recipe, method_of
from moefy.convert import depth, disk, sensitivity, write
from moefy.convert.memory import fit, state_bytes, writing
from moefy.convert.partition.alternating import ROUNDS
from moefy.convert.prepare import SELF, Job
from moefy.convert.probe import speeds
from moefy.convert.refit import EXPERT_STRENGTHS
from moefy.convert.session import Budget
from moefy.files.shards import DTYPES
from moefy.models.shape import pruned

OVERHEAD = 1.12
"""Measured time of these operations within a layer over the shortest of the same ones alone."""

PASSES, PER_EXPERT, PER_INPUT, STARTS = 430.0, 38.0, 1.2e7, 120_000
"""The other work of a layer: passes over the activation of each neuron on each token, and more of
them for each expert; operations of a product per expert and input of the router, which is fitted in
a fixed number of steps; and small operations that are started, which take time on a GPU.

The first three were fitted to SmolLM2-135M on a CPU: 8 experts at 4,096 and 16,384 tokens, 16 at
8,192. The last was fitted to an H100, where a layer of that took 0.8 s, and one of 7B 1.7 s beside
its split."""

LEAST, MOST = 4096, 2**26
"""Calibration tokens that `--minutes` chooses from: with fewer, experts are fitted to noise."""

WRITING = 1.2
"""Operations of a product that take as long as one of a model that writes calibration text, by
SmolLM2-135M in bfloat16."""

BEGIN, PER_BYTE = 4.0, 2.6e-9
"""Seconds to begin and to reopen, and to read, digest and write a byte of the checkpoint. A layer
of 7B took 0.7 s on a machine with one H100."""


def estimate(job: Job, memory: int | None = None, out: Path = Path()) -> dict[str, Any]:
    """Shapes, parameters, FLOPs per token, and estimated memory, disk and time.

    Times assume the speeds of this machine, measured for a moment. A note says so where the
    conversion does not fit in `memory` bytes, on this machine, or on the disk of `out`.
    """
    free = disk.room(out)
    rates, notes = speeds(job.device, job.shape), [*job.notes]
    if job.recipe.minutes is not None:
        affordable = budget(job, rates, memory, free)
        job = with_tokens(job, affordable.tokens)
        notes.append(affordable.note)
    plan = fit(job, write.slots(job), memory)
    notes += [plan.refusal] if plan.refusal else []
    if free < (needed := disk.needed(job, write.slots(job), plan)):
        notes.append(
            f"the disk has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed until the "
            "result is whole"
        )
    if job.recipe.calibration == SELF:
        notes += writing(job, memory).notes
    if (settled := depth.supposed(job)) is not job:
        notes.append("which layers are dropped is measured first; here they are those at the end")
    asked, job, slots = job, settled, write.slots(settled)
    dense, left = job.num_weights, num_parameters(job.checkpoint)
    total = sum(slot.num_bytes // DTYPES[slot.dtype].itemsize for slot in slots.values())
    hidden, shape = job.size("hidden_size"), job.shape
    neuron = (3 if job.family.gated else 2) * hidden
    idle = (shape.num_experts - shape.experts_per_token) * shape.expert_width * neuron
    idle *= job.method.fit is not None
    ffn_flops = 2 * neuron * shape.num_neurons
    embedding = job.checkpoint.entries[job.family.embedding].num_elements
    # Every matrix but the embedding is multiplied once per token; a tied head counts as one.
    tied = job.family.head not in job.checkpoint.entries
    head = embedding * (0 if tied else 1)
    num_dense = job.num_layers - len(job.layers)
    saved = (1 - shape.active_fraction) * ffn_flops * len(job.layers)
    active = total - len(job.layers) * idle
    run = len(job.layers) * shape.num_active + num_dense * shape.num_neurons
    return {
        "model": str(job.checkpoint.folder),
        "family": job.family.model_type,
        "target": job.target.model_type,
        "shape": {**dataclasses.asdict(shape), "active_fraction": shape.active_fraction},
        "method": method_of(dataclasses.asdict(job.recipe)),
        "layers_converted": len(job.layers),
        "layers_dropped": len(job.dropped),
        "layers_left_dense": num_dense,
        "parameters_dense": dense,
        "parameters_total": total,
        "parameters_active": active,
        "parameters_floor": active - run * neuron,
        "flops_per_token_dense": 2 * (dense - head),
        "flops_per_token": int(2 * (left - head) - saved),
        "disk_bytes": sum(slot.num_bytes for slot in slots.values()),
        "state_bytes": state_bytes(job),
        "memory_bytes": plan.peak_bytes,
        "memory_stage": plan.stage,
        "file_bytes": plan.file_bytes,
        "device_bytes": plan.device_bytes,
        "tokens": job.recipe.tokens,
        "seconds": round(seconds(asked, rates), 1),
        "notes": notes,
    }


def budget(
    job: Job,
    rates: Mapping[str, float],
    memory: int | None = None,
    room: float = math.inf,
    *,
    keep: bool = True,
) -> Budget:
    """The most calibration tokens that `--minutes`, the memory and `room` on a disk hold.

    They are whole sequences; there are at least `LEAST` tokens and 8 sequences, whatever they take.
    """
    minutes, length = job.recipe.minutes or 0.0, job.recipe.sequence_length

    def taken(sequences: int) -> float:
        return seconds(with_tokens(job, sequences * length), rates)

    def too_many(sequences: int) -> bool:
        if taken(sequences) > 60 * minutes:
            return True
        tried = with_tokens(job, sequences * length)
        plan = fit(tried, slots := write.slots(tried), memory)
        return bool(plan.refusal) or room < disk.needed(tried, slots, plan, keep=keep)

    least, most = max(8, -(-LEAST // length)), MOST // length
    sequences = least + bisect_left(range(least + 1, most + 1), True, key=too_many)
    return Budget(minutes, sequences * length, round(taken(sequences), 1))


def with_tokens(job: Job, tokens: int) -> Job:
    """The job on so many calibration tokens, which no longer follow from `--minutes`."""
    recipe = dataclasses.replace(job.recipe, tokens=tokens, minutes=None)
    return dataclasses.replace(job, recipe=recipe)


def seconds(job: Job, rates: Mapping[str, float]) -> float:
    """Seconds that a conversion takes where work of each kind goes at these `rates` (see `probe`).

    They count all layers up to the last that is converted, and the search for those to drop.
    """
    searched, job = depth.searched(job), depth.supposed(job)
    layer, passed = _layer_seconds(job, rates)
    whole = layer * len(job.layers) + passed * (max(job.layers) + 1 - len(job.layers))
    # Forwards through all weights; there and back for gradients, of which no weight needs one.
    forwards = 2.0 * job.method.gradient + WRITING * (job.recipe.calibration == SELF)
    products = 2.0 * job.num_weights * job.recipe.tokens * forwards + searched
    if job.weighs:
        length, fitted, probes = sensitivity.PIECES
        few = dataclasses.replace(job.recipe, tokens=length * (fitted + probes))
        method = dataclasses.replace(job.method, fit=None, refine=None)
        small = dataclasses.replace(job, recipe=few, method=method, shape=pruned(job.shape))
        # A static conversion on few tokens, and its branches.
        whole += job.num_layers * _layer_seconds(small, rates)[0]
        products += job.num_layers * length * probes * job.num_weights
    num_bytes = sum(entry.num_bytes for entry in job.checkpoint.entries.values())
    return whole + products / rates["product"] + BEGIN + PER_BYTE * num_bytes


def _layer_seconds(job: Job, rates: Mapping[str, float]) -> tuple[float, float]:
    """Seconds of a layer that is converted, and of one that stays dense."""

    def at(counts: Mapping[str, float]) -> float:
        return sum(count / rates[kind] for kind, count in counts.items())

    taken = {stage: OVERHEAD * at(counts) for stage, counts in operations(job).items()}
    passes = PASSES + PER_EXPERT * job.shape.num_experts
    other = {"pass": passes * job.recipe.tokens * job.shape.num_neurons, "start": STARTS}
    if job.method.fit is not None:
        other["product"] = PER_INPUT * job.shape.num_experts * job.size("hidden_size")
    if job.method.fit is not None and not job.method.copies:
        other |= {"cluster": 1, "assign": 0 if job.shape.overlaps else _rounds(job)}
    return sum(taken.values()) + at(other), taken["attention"] + taken["dense"]


def _rounds(job: Job) -> int:
    """Times that the split assigns the neurons to experts."""
    partition, options = job.recipe.partition, job.recipe.partition_options
    options = options if partition == Recipe.partition else {}
    return 1 + sum(int(options.get(name, ROUNDS)) for name in ("rounds", "routed_rounds"))


def operations(job: Job) -> dict[str, dict[str, float]]:
    """The least floating-point operations that converting a layer takes, by stage and kind.

    Kinds are matrix products, factorisations and triangular solves. Neurons that do not run for a
    token are left out, but for those of experts that overlap. The refit looks for a strength; only
    the factorisation and the solution of the one that it takes count.
    """
    recipe, shape, hidden = job.recipe, job.shape, job.size("hidden_size")
    tokens, neurons = recipe.tokens, shape.num_neurons
    matrices, sides = 3 if job.family.gated else 2, 2 if job.method.error_propagation else 1
    once, gram = 2.0 * tokens * neurons * hidden, 2.0 * tokens * hidden * hidden
    sample = tokens if job.method.sample is None else min(tokens, job.method.sample)
    overlaps = shape.overlaps and job.method.fit is not None
    active = once * min(1.0, shape.active_fraction)
    counts: dict[str, dict[str, float]] = {
        "attention": {
            "product": 2.0 * sides * tokens * (job.other_weights + recipe.sequence_length * hidden)
        },
        "dense": {"product": (sides - 1) * matrices * once},
        "profile": {"product": matrices * once},
        # Each round adds up energies by expert, and each neuron's energy by expert.
        "split": {"product": 4.0 * _rounds(job) * sample * neurons * shape.num_experts + gram},
        # The router is fitted to energies, then to errors that the experts' outputs leave.
        "route": {"product": once + gram},
        "run": {"product": active},
    }
    if job.method.copies:
        counts |= {"split": {}, "run": {"product": matrices * shape.active_fraction * once}}
    if recipe.polish:
        counts["polish"] = {"product": 3.0 * matrices * active * recipe.polish}
    if recipe.refit:
        used = neurons if job.method.fit is not None else shape.num_active
        times = 2 if job.method.refine is not None else 1
        # Half of the Gram matrix: the shared neurons with each other; those of an expert, on its
        # tokens, with the shared ones and those of the experts before it.
        squares = float(tokens * used * used)
        if job.method.fit is not None and not overlaps:
            routed = shape.experts_per_token * shape.expert_width
            before = 2 * shape.num_shared + (shape.num_experts + 1) * shape.expert_width
            squares = float(tokens * (shape.num_shared**2 + routed * before))
        counts["refit"] = {
            "product": times * (2 * (once if overlaps else active) + squares),
            "factor": times * used**3 / 3,
            "solve": times * 2.0 * used * used * hidden,
        }
    if recipe.refit and overlaps:
        # Each expert on its own tokens, under every strength: its Gram matrix, and what it leaves.
        width, tried = shape.expert_width, len(EXPERT_STRENGTHS)
        chosen = 2.0 * tokens * shape.experts_per_token * width
        counts["refit of experts"] = {
            "product": active + chosen * (width + hidden * (1 + tried / 8)),
            "factor": shape.num_experts * tried * width**3 / 3,
            "solve": shape.num_experts * tried * 2.0 * width * width * hidden,
        }
    return counts
