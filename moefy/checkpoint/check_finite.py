"""Check every stored value once before any work: is it finite, and is it plausible?

The files are read from end to end, which also gives their digests.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.checkpoint.tensors import Checkpoint
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import CONFIG, read_header
from moefy.files.shards import DTYPES, blocks

ABSURD = 1e4
"""A value above this many times the root mean square of the others gives a warning. Values of
trained models stay below some hundreds; a flipped bit of the exponent gives powers of 2**16."""

SMALL = 8.0  # values up to this never give a warning


@dataclass(frozen=True)
class Scan:
    """One-line warnings, and the SHA-256 of every file by its name."""

    notes: tuple[str, ...]
    digests: dict[str, str]


def scan(
    checkpoint: Checkpoint,
    ffn: Collection[str] = (),
    watch: Callable[[int, int], None] = lambda *_: None,
) -> Scan:
    """Check all values of a checkpoint; the tensors `ffn` are those to be converted.

    `watch` is called with the bytes read and the total. Memory: two blocks.

    Raises:
        MoefyError: code 3 for NaN and infinity, for a constant matrix in `ffn`, and for a file that
            has shrunk since its header was read.
    """
    names = {(e.file, e.start): name for name, e in checkpoint.entries.items() if e.num_elements}
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    total, done = sum(file.stat().st_size for file in files), 0
    notes: list[str] = []
    digests = {}
    for path in files:
        digest = hashlib.sha256()
        entries = sorted(read_header(path).values(), key=lambda entry: (entry.start, entry.stop))
        with path.open("rb") as file:
            digest.update(file.read(entries[0].start))
        for entry in entries:
            name, values = names.get((path, entry.start)), _Values()
            for block in blocks(entry):
                digest.update(block)
                if name:  # a tensor that the class reads
                    values.add(torch.frombuffer(block, dtype=DTYPES[entry.dtype]))
                watch(done := done + len(block), total)
            if name:
                notes += values.judge(name, matrix=len(entry.shape) > 1, ffn=name in ffn)
        digests[path.name] = digest.hexdigest()
    digests[CONFIG] = sha256(checkpoint.folder / CONFIG)
    return Scan(tuple(notes), digests)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise code 3 for NaN and infinity."""
    values = _Values()
    values.add(tensor.reshape(-1))
    values.judge(name, matrix=False, ffn=False)


class _Values:
    """Statistics of one tensor's values."""

    def __init__(self) -> None:
        self.count = self.bad = 0
        self.least, self.most = math.inf, -math.inf
        self.squares = 0.0

    def add(self, values: Tensor) -> None:
        """Add more values."""
        if not len(values):
            return
        self.count += len(values)
        least, most = (float(x) for x in values.aminmax())
        if not (math.isfinite(least) and math.isfinite(most)):
            self.bad += len(values) - int(values.isfinite().sum())
            return
        self.least, self.most = min(least, self.least), max(most, self.most)
        if (peak := max(most, -least)) > SMALL:
            rest = values.double()
            self.squares += float(rest[rest.abs() < peak].square().sum())
        else:
            self.squares += float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2

    def judge(self, name: str, *, matrix: bool, ffn: bool) -> list[str]:
        """One-line warnings; raises code 3 for values that make a conversion impossible."""
        if not self.count:
            return []
        if self.bad:
            raise MoefyError(
                f"tensor {name}: {self.bad} of {self.count} values are NaN or infinite; expected "
                "numbers: take a checkpoint from before its training diverged, or fetch a damaged "
                "file again"
            )
        if self.least == self.most and self.count > 1 and matrix:
            constant = f"tensor {name} is all {f'{self.most:g}' if self.most else 'zeros'}"
            if ffn:
                raise MoefyError(
                    f"{constant}, so its FFN cannot be divided; expected trained weights; keep the "
                    "layer dense (--layers), or fetch a damaged file again"
                )
            return [f"{constant}, as if never trained"]
        peak, usual = max(self.most, -self.least), math.sqrt(self.squares / self.count)
        if peak > SMALL and peak > ABSURD * usual > 0:
            return [
                f"tensor {name} has a value of {peak:.1e}, and others are about {usual:.1e}, as "
                "after a flipped bit; compare the file's SHA-256 with its source's"
            ]
        return []
