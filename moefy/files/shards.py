"""Read and write tensors of safetensors files, one in memory at a time.

Files are read and written by offset, not by memory maps, which would count as resident memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.files.publish import BLOCK, hexdigest, sync, write_json
from moefy.files.safetensors_header import BYTES, Entry, damaged, read_config, read_entries

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in a checkpoint's configuration, else that of most of its values."""
    config = read_config(folder)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(dtype, torch.dtype):
        return dtype
    counts: Counter[str] = Counter()
    for entry in read_entries(folder).values():
        counts[entry.dtype] += entry.num_elements
    return DTYPES[counts.most_common(1)[0][0]]


def read(name: str, entry: Entry, room: Callable[..., Tensor] = torch.empty) -> Tensor:
    """The tensor of that name, as stored, in memory that `room` allocates.

    Raises:
        MoefyError: code 3, when the file has shrunk since its header was read.
    """
    data = room(entry.stop - entry.start, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if data.numel() and file.readinto(data.numpy().data) != data.numel():
            raise MoefyError(f"{entry.file} ends inside tensor {name}; fetch the file again")
    return data.view(DTYPES[entry.dtype]).view(entry.shape)


def read_rows(entry: Entry, ids: Tensor) -> Tensor:
    """Rows `ids` (any shape) of a matrix, float32, reading only those rows."""
    width = entry.shape[1]
    size = (entry.stop - entry.start) // entry.shape[0]
    unique, inverse = torch.unique(ids, return_inverse=True)
    data = torch.empty(len(unique) * size, dtype=torch.uint8)
    view = data.numpy().data
    with entry.file.open("rb") as file:
        for place, row in enumerate(unique.tolist()):
            file.seek(entry.start + row * size)
            file.readinto(view[place * size : (place + 1) * size])
    table = data.view(DTYPES[entry.dtype]).view(-1, width).float()
    return table[inverse]


@dataclass(frozen=True)
class Slot:
    """A tensor to be written: dtype code and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * BYTES[self.dtype]


class ShardWriter:
    """Writes tensors in any order into shards with a fixed layout.

    `finish` writes the headers: before that no file can be mistaken for a model. With `resume` the
    files of an earlier writer of the same layout stay, and `keep` says which tensors are right.

    Not `huggingface_hub.split_state_dict_into_shards_factory`: it puts a tensor larger than a shard
    before others, and would give other bytes than earlier versions did.
    """

    def __init__(
        self,
        folder: Path,
        slots: Mapping[str, Slot],
        *,
        name: str = "model",
        shard_bytes: int = 5 * 10**9,
        resume: bool = False,
    ) -> None:
        self.folder, self.name = folder, name
        self.total_bytes = sum(slot.num_bytes for slot in slots.values())
        self.digests: dict[str, str] = {}
        """SHA-256 of every written tensor."""
        self._slots = slots
        self._shards = _shards(slots, shard_bytes)
        self._where: dict[str, tuple[Path, int]] = {}
        self._headers: dict[Path, bytes] = {}
        count = len(self._shards)
        for number, group in enumerate(self._shards, 1):
            part = "" if count == 1 else f"-{number:05d}-of-{count:05d}"
            file = folder / f"{name}{part}.safetensors"
            header, start = _header({key: slots[key] for key in group})
            self._headers[file] = header
            for key in group:
                self._where[key] = (file, start)
                start += slots[key].num_bytes
            with file.open("r+b" if resume and file.exists() else "wb") as out:
                out.truncate(start)
        self._left = set(slots)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the dtype and shape of its slot."""
        slot = self._slots[name]
        assert CODES[tensor.dtype] == slot.dtype and tuple(tensor.shape) == slot.shape, name
        self._put(name, [_bytes(tensor)])

    def copy(self, name: str, entry: Entry) -> None:
        """Copy a tensor's bytes from its file, block by block."""
        assert self._slots[name].num_bytes == entry.stop - entry.start, name
        self._put(name, blocks(entry))

    def _put(self, name: str, blocks: Iterable) -> None:
        file, start = self._where[name]
        digest = hashlib.sha256()
        with file.open("r+b") as out:
            out.seek(start)
            for block in blocks:
                out.write(block)
                digest.update(block)
        self.digests[name] = digest.hexdigest()
        self._left.discard(name)

    def sync(self, names: Iterable[str]) -> dict[str, str]:
        """Flush the files of these tensors to disk; give the tensors' digests."""
        digests = {name: self.digests[name] for name in names}
        for file in sorted({self._where[name][0] for name in digests}):
            sync(file)
        return digests

    def keep(self, digests: Mapping[str, str]) -> bool:
        """Whether an earlier writer wrote these tensors; if so they count as written."""
        for name, digest in digests.items():
            file, start = self._where[name]
            if hexdigest(file, start, start + self._slots[name].num_bytes) != digest:
                return False
        self.digests |= digests
        self._left -= digests.keys()
        return True

    def finish(self) -> list[Path]:
        """Write headers and the index, flush all to disk, and give the files."""
        assert not self._left, f"never written: {sorted(self._left)[:3]}"
        for file, header in self._headers.items():
            with file.open("r+b") as out:
                out.write(header)
            sync(file)
        files = list(self._headers)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: file.name for name, (file, _) in sorted(self._where.items())},
            }
            files.append(write_json(self.folder / f"{self.name}.safetensors.index.json", index))
        return files


def sha256(tensor: Tensor) -> str:
    """Hexadecimal SHA-256 of a tensor's bytes as they are stored."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def save(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors as `name`.safetensors, flushed to disk; give their digests."""
    slots = {key: Slot(CODES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}
    writer = ShardWriter(folder, slots, name=name, shard_bytes=2**62)
    for key, tensor in tensors.items():
        writer.write(key, tensor)
    writer.finish()
    return writer.digests


def blocks(entry: Entry) -> Iterator[bytearray]:
    """The bytes of a stored tensor, block by block.

    Raises:
        MoefyError: code 3, when the file has shrunk since its header was read.
    """
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.stop - entry.start
        while left:
            block = bytearray(min(BLOCK, left))
            if file.readinto(block) != len(block):
                raise damaged(f"{entry.file} has become shorter while it was read")
            left -= len(block)
            yield block


def _shards(slots: Mapping[str, Slot], most: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `most` bytes (a larger tensor stands alone)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, slot in slots.items():
        if shards[-1] and size + slot.num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += slot.num_bytes
    return shards


def _header(slots: Mapping[str, Slot]) -> tuple[bytes, int]:
    """The bytes of a safetensors header for these tensors in this order, and its length."""
    spec: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, slot in slots.items():
        stop = start + slot.num_bytes
        spec[name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(spec, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text)
