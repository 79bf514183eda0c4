"""The dtype in which all models of a report compute, and the dtypes in which speed is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moefy.compute_dtype import ComputeDtype, compute_dtype, name_of, slowness
from moefy.errors import MoefyError
from moefy.evaluate.speed import HOPELESS
from moefy.files.safetensors_header import read_entries
from moefy.files.shards import stored_dtype
from moefy.memory import LIBRARIES, available


def num_bytes(folders: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes of the models in `folders` when all of them are open in `dtype`."""
    values = sum(e.num_elements for folder in folders for e in read_entries(folder).values())
    return dtype.itemsize * values


def room(device: torch.device) -> int:
    """Free bytes for models on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, available() - LIBRARIES)


def one_dtype(asked: str, folders: Sequence[Path], device: torch.device) -> ComputeDtype:
    """The dtype for all models in `folders`, the first of which is dense and decides.

    A folder is listed once for each model of its size that is open at the same time.

    Raises:
        MoefyError: code 2 or 5, as `compute_dtype`, and 5 for models that do not fit on a GPU.
    """
    free, takes = room(device), num_bytes(folders, torch.float32)
    stored = stored_dtype(folders[0])
    compute = compute_dtype(asked, stored, device, float32_bytes=takes, room=free)
    if device.type != "cpu" and (needed := num_bytes(folders, compute.dtype)) > free:
        raise MoefyError(
            f"{len(folders)} models in {compute.name} take {needed / 1e9:.1f} GB, and the GPU has "
            f"{free / 1e9:.1f} GB free; score them on the processor: --device cpu",
            code=5,
        )
    return compute


def dtypes_to_try(
    asked: str,
    stored: torch.dtype,
    computed: torch.dtype,
    folders: Sequence[Path],
    device: torch.device,
) -> tuple[list[torch.dtype], dict[str, str]]:
    """The dtypes in which speed is measured, and the reason for each one that is left out.

    A dtype that the user `asked` for is the only one. Else the stored dtype and float32 are tried,
    unless a small product shows that one is hopeless. The models are open in `computed` already, so
    another dtype must fit into memory beside it.
    """
    if asked != "auto":
        return [computed], {}
    chosen, left_out = [computed], {}
    for dtype in dict.fromkeys((stored, torch.float32)):
        if dtype == computed:
            continue
        times, needed = slowness(dtype, device), num_bytes(folders, dtype)
        left = max(0, room(device) - num_bytes(folders, computed))
        if times > HOPELESS:
            left_out[name_of(dtype)] = f"a product takes {times:.1f} times as long as in float32"
        elif needed > left:
            left_out[name_of(dtype)] = (
                f"the models take {needed / 1e9:.1f} GB more in it, of "
                f"{left / 1e9:.1f} GB that are left"
            )
        else:
            chosen.append(dtype)
    return chosen, left_out
