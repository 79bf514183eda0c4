"""Buffers for the states of all calibration tokens: in memory, or in memory-mapped files.

Both are tensors, and results have the same bytes.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class Store:
    """Allocates tensors: in files in `folder`, or in memory without a folder.

    A file has no name: it ends with its tensor or its process. Its disk space is reserved first: a
    mapped file without space kills its process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(
        self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """A tensor without values; a GPU's lies in its own memory.

        Raises:
            OSError: when the disk is full.
        """
        num_bytes = math.prod(size) * dtype.itemsize
        if self.folder is None or not num_bytes or (device and device.type != "cpu"):
            return torch.empty(size, dtype=dtype, device=device)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.truncate(num_bytes)
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            mapped = mmap.mmap(file.fileno(), num_bytes)
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(size)

    def release(self) -> None:
        """Drop the pages of mapped files from resident memory; they are read again when needed.

        The system does this itself where memory is short. Dropping them keeps the resident size to
        what is needed.
        """
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


MEMORY = Store()
"""The default store."""
