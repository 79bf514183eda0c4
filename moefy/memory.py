"""How much memory a conversion takes, and how much there is."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Mapping
from pathlib import Path

from moefy.errors import MoefyError
from moefy.job import Job
from moefy.profile import CHUNK
from moefy.reopen import MEMORY
from moefy.shards import Slot

LIBRARIES = 700_000_000
"""Resident bytes of Python, torch, transformers and scikit-learn before any tensor."""

CGROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process may hold: the machine's, or fewer where a limit is set."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found.append(soft)
    return min([*found, *_cgroup_limits()])


def _cgroup_limits() -> list[int]:
    """Limits of the control groups that this process is in, the outer ones included."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = next((line.split("::/", 1)[1] for line in lines if line.startswith("0::/")), "")
    folders = [folder for folder in (CGROUPS / own, *(CGROUPS / own).parents)]
    files = [folder / "memory.max" for folder in folders if folder.is_relative_to(CGROUPS)]
    texts = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in texts if text.isdecimal()]  # the others say "max"


def require(needed: int, what_for: str, instead: str) -> None:
    """Refuse, with code 5, what takes more memory than there is."""
    if needed > (most := available()):
        raise MoefyError(
            f"{what_for} takes {needed / 1e9:.1f} GB of memory, there are {most / 1e9:.1f} GB; "
            f"{instead}",
            code=5,
        )


def predicted(job: Job, slots: Mapping[str, Slot]) -> int:
    """Peak resident bytes: of one layer in float32 with the states and the largest stage's work, or
    of the model that is opened again, of which `slots` are the tensors."""
    hidden, neurons = job.size("hidden_size"), job.shape.num_neurons
    tokens = job.recipe.tokens
    layer = 4 * (3 * hidden * neurons + 4 * hidden * hidden)
    states = 4 * tokens * hidden * (8 if job.method.drift else 4)
    activations = min(1 << 30, 4 * tokens * neurons)
    sample = 4 * min(tokens, 8192) * neurons * 2
    used = neurons if job.method.fit is not None else job.shape.num_active
    gram = 4 * (3 * used * used + 2 * used * hidden) if job.recipe.refit else 0
    work = max(sample, gram, 4 * CHUNK * neurons * 4)
    model = 0
    if job.recipe.calibration == "self":
        model = sum(entry.stop - entry.start for entry in job.checkpoint.entries.values())
    kept = whole = 0
    if job.method.gradient:
        kept = 2 * len(job.layers) * tokens * hidden
        way_back = 4 * job.recipe.sequence_length * job.num_layers * (16 * hidden + 4 * neurons)
        way_back += 16 * job.recipe.sequence_length * job.size("vocab_size")
        whole = 4 * sum(entry.num_elements for entry in job.checkpoint.entries.values()) + way_back
    # It is read from a mapped file, whose pages count, into float32 if that is small enough.
    stored = sum(slot.num_bytes for slot in slots.values())
    wide = 4 * sum(math.prod(slot.shape) for slot in slots.values())
    reopened = stored + wide if wide <= MEMORY else 2 * min(stored, MEMORY)
    reopened += states // 4 + 4 * job.num_layers * job.recipe.sequence_length * hidden
    layers = layer + states + activations + work + kept
    return LIBRARIES + max(layers, 2 * model, whole + kept, reopened)
