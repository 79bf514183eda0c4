"""Buffers for the states of all calibration tokens: on a GPU, in memory, or in mapped files.

All are tensors, and results have the same bytes.
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

CPU = torch.device("cpu")


class Store:
    """Allocates tensors: in files in `folder`, or without a folder in the memory of `device`.

    A file has no name: it ends with its tensor or its process. Its disk space is reserved first: a
    mapped file without space kills its process.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device = CPU,
        *,
        keeps_activations: bool = True,
    ) -> None:
        self.folder = folder
        self.device = device
        self.keeps_activations = keeps_activations  # else they are computed again, chunk by chunk
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor without values.

        Raises:
            OSError: when the disk is full.
        """
        num_bytes = math.prod(size) * dtype.itemsize
        if self.folder is None or not num_bytes:
            return torch.empty(size, dtype=dtype, device=self.device)
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
