"""How much memory there is, and what a process holds before it does anything."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from moefy.errors import MoefyError

LIBRARIES = 600_000_000
"""Resident bytes of Python, torch, transformers and scikit-learn before any tensor."""

TEXT = 12  # resident bytes of a tokenizer per byte of its file

CGROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Bytes that this process may hold: the machine's, or fewer where a limit is set."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    soft_limits = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return min([machine, *soft_limits, *_cgroup_limits()])


def host_room() -> int:
    """Bytes of memory that each process on this machine may hold."""
    return available() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _cgroup_limits() -> list[int]:
    """Limits of the control groups that this process is in, the outer ones included."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, kinds, own = line.split(":", 2)
        root, name = CGROUPS, "memory.max"
        if "memory" in kinds.split(","):  # version 1
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        elif kinds:
            continue
        place = root / own.lstrip("/")
        folders = [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]
        files += [folder / name for folder in folders]
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


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that are free; of no other device's memory is there a count."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def base_bytes(folder: Path) -> int:
    """What is held all the time: libraries, and the tokenizer in a checkpoint's folder."""
    tokenizer = folder / "tokenizer.json"
    return LIBRARIES + (TEXT * tokenizer.stat().st_size if tokenizer.is_file() else 0)
