"""A checkpoint folder whose headers have been read: torch is needed only to read its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moefy.files.safetensors_header import Entry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A dense checkpoint folder: its configuration as stored, and every tensor by name."""

    folder: Path
    config: Mapping[str, object]
    entries: Mapping[str, Entry]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, as stored."""
        from moefy.files.shards import read

        return read(name, self.entries[name])

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape) of a matrix, float32, reading only those rows."""
        from moefy.files.shards import read_rows

        return read_rows(self.entries[name], ids)
