"""What a conversion will take and give, from headers and configuration alone."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from moefy.checkpoint.cut import num_parameters
from moefy.config.recipe import method_of
from moefy.convert import depth, sensitivity, write
from moefy.convert.memory import fit, state_bytes, writing
from moefy.convert.prepare import SELF, Job
from moefy.convert.profile import SAMPLE
from moefy.files.shards import DTYPES
from moefy.models.shape import pruned

OVERHEAD = 1.05
"""Measured time of these operations within a layer over that of the same ones alone."""

PER_ACTIVATION, PER_INPUT = 8e3, 2.4e8
"""The other work of a layer, counted in operations of a product that take as long. The first is per
activation of a neuron, which several passes over memory read. The second is per input of the
router, which is fitted in a fixed number of steps. Both were fitted to SmolLM2-135M at 4,096 and
16,384 tokens. A 7B-shaped layer takes 183 s; its products (150 s) and this work make 172 s."""

SPEEDS = {"product": 1.0, "factor": 0.5, "solve": 0.5}
"""Measured speed of operations, of which a matrix product's is one."""


def estimate(job: Job, memory: int | None = None) -> dict[str, Any]:
    """Shapes, parameters, FLOPs per token, and estimated memory, disk and time.

    Times assume the matrix-product speed of this machine, measured for a moment. A note says so
    where the conversion does not fit in `memory` bytes or on this machine.
    """
    plan = fit(job, write.slots(job), memory)
    notes = [*job.notes, *([plan.refusal] if plan.refusal else [])]
    if job.recipe.calibration == SELF:
        notes += writing(job, memory).notes
    if (settled := depth.supposed(job)) is not job:
        notes.append("which layers are dropped is measured first; here they are those at the end")
    job, slots = settled, write.slots(settled)
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
        "seconds": round(_seconds(job), 1),
        "notes": notes,
    }


def _seconds(job: Job) -> float:
    """Seconds for all layers up to the last that is converted, at this machine's speed."""
    taken = _stages(job)
    layer = sum(taken.values()) + PER_ACTIVATION * job.recipe.tokens * job.shape.num_neurons
    layer += PER_INPUT * job.size("hidden_size") if job.method.fit is not None else 0
    num_dense = max(job.layers) + 1 - len(job.layers)
    # There and back through all weights, of which none needs a gradient.
    gradient = 4 * job.num_weights * job.recipe.tokens if job.method.gradient else 0
    whole = layer * len(job.layers) + (taken["attention"] + taken["dense"]) * num_dense + gradient
    return (whole + (_weighing(job) if job.weighs else 0)) / _speed(job.device)


def _weighing(job: Job) -> float:
    """Operations of `sensitivity.savings`: a static conversion on few tokens, and its branches."""
    length, fitted, probes = sensitivity.PIECES
    few = dataclasses.replace(job.recipe, tokens=length * (fitted + probes))
    method = dataclasses.replace(job.method, fit=None, refine=None)
    small = dataclasses.replace(job, recipe=few, method=method, shape=pruned(job.shape))
    layer = sum(_stages(small).values()) + PER_ACTIVATION * few.tokens * job.shape.num_neurons
    return job.num_layers * (layer + length * probes * job.num_weights)


def _stages(job: Job) -> dict[str, float]:
    """Operations of a layer by stage, counted as products that take as long."""
    return {
        stage: OVERHEAD * sum(count / SPEEDS[kind] for kind, count in counts.items())
        for stage, counts in operations(job).items()
    }


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
    sample, overlaps = min(tokens, SAMPLE), shape.overlaps and job.method.fit is not None
    active = once * min(1.0, shape.active_fraction)
    counts: dict[str, dict[str, float]] = {
        "attention": {
            "product": 2.0 * sides * tokens * (job.other_weights + recipe.sequence_length * hidden)
        },
        "dense": {"product": (sides - 1) * matrices * once},
        "profile": {"product": matrices * once},
        # Each of 9 rounds adds up energies by expert, and each neuron's energy by expert.
        "split": {"product": 36.0 * sample * neurons * shape.num_experts + gram},
        # The router is fitted to energies, then to errors that the experts' outputs leave.
        "route": {"product": once + gram},
        "run": {"product": active},
    }
    if job.method.copies:
        counts |= {"split": {}, "run": {"product": matrices * shape.active_fraction * once}}
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
    return counts


def _speed(device: torch.device, size: int = 1024) -> float:
    """Float32 matrix-product operations per second, from a few products."""
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    torch.mm(a, b)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        torch.mm(a, b).sum().item()
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - start)
