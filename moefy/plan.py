"""What a conversion will take and give, from headers and configuration alone."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from moefy import output
from moefy.job import Job
from moefy.memory import predicted
from moefy.shards import DTYPES

OVERHEAD = 2.0
"""Measured time of a layer over that of its matrix products alone."""


def estimate(job: Job) -> dict[str, Any]:
    """Shapes, parameters, FLOPs per token, and estimated memory, disk and time.

    Times assume the matrix-product speed of this machine, measured for a moment.
    """
    slots = output.slots(job)
    dense = sum(entry.num_elements for entry in job.checkpoint.entries.values())
    total = sum(slot.num_bytes // DTYPES[slot.dtype].itemsize for slot in slots.values())
    hidden, shape = job.size("hidden_size"), job.shape
    neuron = (3 if job.family.gated else 2) * hidden
    idle = (shape.num_experts - shape.experts_per_token) * shape.expert_width * neuron
    if job.method.fit is None:
        idle = 0
    ffn_flops = 2 * neuron * shape.num_neurons
    embedding = job.checkpoint.entries[job.family.embedding].num_elements
    # Every matrix but the embedding is multiplied once per token; a tied head counts as one.
    tied = job.family.head not in job.checkpoint.entries
    matrix = dense - embedding * (0 if tied else 1)
    saved = (1 - shape.active_fraction) * ffn_flops * len(job.layers)
    return {
        "model": str(job.checkpoint.folder),
        "family": job.family.model_type,
        "target": job.target.model_type,
        "shape": {**dataclasses.asdict(shape), "active_fraction": shape.active_fraction},
        "layers_converted": len(job.layers),
        "layers_left_dense": job.num_layers - len(job.layers),
        "parameters_dense": dense,
        "parameters_total": total,
        "parameters_active": total - len(job.layers) * idle,
        "flops_per_token_dense": 2 * matrix,
        "flops_per_token": int(2 * matrix - saved),
        "disk_bytes": sum(slot.num_bytes for slot in slots.values()),
        "memory_bytes": predicted(job, slots),
        "seconds": round(_seconds(job), 1),
        "notes": list(job.notes),
    }


def _seconds(job: Job) -> float:
    """Seconds for all layers: their matrix products at this machine's speed, times overhead."""
    hidden, neurons, tokens = job.size("hidden_size"), job.shape.num_neurons, job.recipe.tokens
    attention = tokens * (8 * hidden * hidden + 4 * hidden * job.recipe.sequence_length)
    ffn = tokens * 8 * hidden * neurons
    refit = 2 * tokens * neurons * (neurons + 2 * hidden) + 4 * neurons**3 // 3
    if job.method.drift:  # the dense model's states go along
        attention, ffn = 2 * attention, ffn + tokens * 6 * hidden * neurons
    per_layer = attention + ffn + (refit if job.recipe.refit else 0)
    weights = sum(entry.num_elements for entry in job.checkpoint.entries.values())
    # There and back through all weights, of which none needs a gradient.
    gradient = 4 * weights * tokens if job.method.gradient else 0
    return OVERHEAD * (per_layer * job.num_layers + gradient) / _speed(job.device)


def _speed(device: torch.device, size: int = 1024) -> float:
    """Float32 matrix-product operations per second, from a few products."""
    a, b = torch.rand(size, size, device=device), torch.rand(size, size, device=device)
    torch.mm(a, b)
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        torch.mm(a, b).sum().item()
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - start)
