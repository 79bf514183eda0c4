"""How much of a disk a conversion takes, and how much there is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from moefy.convert.memory import Plan, state_bytes
from moefy.convert.prepare import Job
from moefy.files.publish import place_of
from moefy.files.shards import Slot

SPARE = 1.1
"""Bytes that a conversion asks for, over those that it will write."""


def room(out: Path) -> int:
    """Bytes of disk that a conversion to `out` may fill: free ones, and those that a stopped one
    holds there already."""
    place = out.absolute()
    near = next(folder for folder in (place, *place.parents) if folder.exists())
    return shutil.disk_usage(near).free + used(place_of(place))


def used(folder: Path) -> int:
    """Bytes on disk of the files below a folder."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def needed(job: Job, slots: Mapping[str, Slot], plan: Plan, *, keep: bool = True) -> int:
    """Bytes of disk for the result and for what is kept until it is whole."""
    result = sum(slot.num_bytes for slot in slots.values())
    return int(SPARE * (result + plan.file_bytes + (state_bytes(job) if keep else 0)))
