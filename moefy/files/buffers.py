"""Where the states of all calibration tokens lie: in memory, or in files that are mapped into it.

Either way they are tensors, and what is computed from them has the same bytes.
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
    """Room for tensors: files in `folder`, or memory where there is no folder.

    A file has no name, so that nothing is left of it when the process dies, and ends with its
    tensor. Its disk space is set aside first: a mapped file that finds none kills its process.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(
        self, *size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Tensor:
        """A tensor whose values are not set yet. Those of a GPU lie in its own memory.

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
        """Let go of the pages of files that are in this process; what is read again comes back.

        Without this nothing is lost where memory is short, for the system takes them back itself.
        With it, resident memory is what is needed.
        """
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


MEMORY = Store()
"""The room that all have who are given none."""
