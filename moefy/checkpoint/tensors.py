"""A checkpoint folder whose headers have been read: torch is needed only to read its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    held: Mapping[str, Tensor] = field(default_factory=dict)  # tensors that are in memory already

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, as stored."""
        from moefy.files.shards import read

        return self.held[name] if name in self.held else read(name, self.entries[name])

    def holding(self, prefix: str) -> Checkpoint:
        """The same, with the tensors whose names begin so in memory."""
        names = [name for name in self.entries if name.startswith(prefix)]
        return replace(self, held={name: self.tensor(name) for name in names})

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape) of a matrix, float32, reading only those rows."""
        from moefy.files.shards import read_rows

        return read_rows(self.entries[name], ids)
