"""The libraries and the machine, which decide the bytes of a conversion beside its inputs."""

from __future__ import annotations

import hashlib
import importlib
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from moefy import __version__

LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "sklearn")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    libraries = {name: str(importlib.import_module(name).__version__) for name in LIBRARIES}
    return {"python": platform.python_version(), **libraries}


def machine(device: torch.device) -> dict[str, str | int]:
    """The properties of this machine that decide how sums are rounded."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """The processor's name, and the instructions that torch uses: `AMD EPYC, AVX512`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def code(without: Collection[str] = (), folder: Path = Path(__file__).parent) -> str:
    """Version of moefy, with a digest of its sources, which change between releases.

    `without` are files and rooms, named from the package's folder, that do not count.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not any(name.is_relative_to(part) for part in without):
            digest.update(str(name).encode() + b"\0" + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:12]})"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two nested tables, a line each.

    >>> differences({"recipe": {"active": 0.5}}, {"recipe": {"active": 0.25}})
    ['recipe.active was 0.5, is 0.25']
    """
    old, new = _flat(before), _flat(now)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key} {_change(old.get(key), new.get(key))}" for key in changed]


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in table.items():
        inner = _flat(value) if isinstance(value, Mapping) else {}
        flat |= {f"{key}.{name}": item for name, item in inner.items()} or {key: value}
    return flat


def _change(old: Any, new: Any) -> str:
    if old is None or new is None:
        return "is new" if old is None else "is gone"
    long = max(len(str(old)), len(str(new))) > 60  # digests are not worth showing
    return "differs" if long else f"was {old}, is {new}"
