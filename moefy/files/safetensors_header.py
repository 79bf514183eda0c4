"""A checkpoint folder's configuration, and the headers of its shards, read without torch."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from moefy.errors import MoefyError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MAX_CONFIG, MAX_INDEX, MAX_DEPTH = 1_000_000, 32_000_000, 50
MAX_HEADER = 100_000_000
BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Size of a value, by the dtype's code."""


@dataclass(frozen=True)
class Entry:
    """A stored tensor: its file, dtype code, shape, and byte range in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.stop - self.start


def damaged(message: str) -> MoefyError:
    """An error of code 3 for damaged files."""
    return MoefyError(f"{message}; fetch it again (hf download)")


def contradiction(message: str) -> MoefyError:
    """An error of code 3 for a configuration that is wrong or does not fit the tensors."""
    return MoefyError(f"{message}; correct {CONFIG}, or fetch the model again (hf download)")


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint folder.

    Raises:
        MoefyError: code 3 when there is none, or it cannot be read.
    """
    if not os.path.lexists(folder / CONFIG) and folder.is_dir() and (what := _other(folder)):
        raise MoefyError(f"{folder} holds no {CONFIG}, but {what}")
    return read_json(regular_file(folder, CONFIG), MAX_CONFIG)


def read_entries(folder: Path, *, ignore_index: bool = False) -> dict[str, Entry]:
    """Every tensor of the checkpoint, from the headers of its shards.

    An index must list the same tensors. With `ignore_index` it only names the files.
    """
    names = [name for name in (SINGLE, INDEX) if os.path.lexists(folder / name)]
    if not names:
        what = _other(folder)
        raise MoefyError(f"{folder} holds no {SINGLE} and no {INDEX}{f', but {what}' * bool(what)}")
    if len(names) == 2:
        raise MoefyError(f"{folder} holds {SINGLE} and {INDEX}: ambiguous; remove the stale one")
    if names == [SINGLE]:
        return read_header(regular_file(folder, SINGLE))
    index = _weight_map(regular_file(folder, INDEX))
    shards = sorted(set(index.values()))
    if missing := [name for name in shards if not os.path.lexists(folder / name)]:
        raise damaged(f"{folder} lacks {some(missing, 200)}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        header = read_header(regular_file(folder, shard))
        if twice := sorted(header.keys() & entries.keys()):
            raise damaged(f"{folder / shard} and another shard both hold {some(twice)}")
        entries |= header
    if not ignore_index and (odd := sorted(entries.keys() ^ index.keys())):
        place = "listed but in no shard" if odd[0] in index else "in a shard but not listed"
        raise MoefyError(
            f"{folder / INDEX} does not fit its shards: {odd[0]!r} is {place}; fetch it again "
            "(hf download), or go by the shards (--set ignore_index=true)"
        )
    return entries


def _other(folder: Path) -> str:
    """What a folder holds instead of a model, and what to do; empty if unknown."""
    if any(os.path.lexists(folder / name) for name in (SINGLE, INDEX)):
        return ""
    if os.path.lexists(folder / ADAPTER):
        return (
            f"an adapter ({ADAPTER}), which is no model by itself; merge it into its base model "
            "(PEFT's merge_and_unload) and save that with save_pretrained()"
        )
    names = sorted(file.name for file in folder.iterdir())
    if tensors := [name for name in names if name.endswith(".safetensors")]:
        formats = f"transformers' own format is a {SINGLE} or an {INDEX}"
        return f"other safetensors ({some(tensors)}); {formats}: fetch that, or rename the file"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        return f"pickles ({some(pickles)}), never opened: convert with save_pretrained()"
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"GGUF files ({some(gguf)}); expected the checkpoint that they were made from"
    return ""


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files, from the index if there is one."""
    if not os.path.lexists(folder / INDEX):
        return [SINGLE]
    return sorted(set(_weight_map(regular_file(folder, INDEX)).values()))


def _weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor in the index: plain names in the index's own folder."""
    index = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise damaged(f"{path} has no weight_map, or an empty one")
    for name in index.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+ -]+\.safetensors", name):
            allowed = "for security only *.safetensors files beside it are read"
            raise MoefyError(f"{path} names the file {short(name)}, but {allowed}")
    return index


def read_header(path: Path) -> dict[str, Entry]:
    """Entries of one safetensors file, checked against the file's size.

    Raises:
        MoefyError: code 3, when the header does not describe the file exactly.
    """

    def broken(reason: str) -> MoefyError:
        return MoefyError(f"{path} is not a whole safetensors file: {reason}; fetch the file again")

    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise broken(f"it has {size} bytes, a header needs at least 8")
        if head == b"version ":
            raise MoefyError(f"{path} is a pointer of Git LFS; fetch the file itself: git lfs pull")
        (length,) = struct.unpack("<Q", head)
        if length > min(MAX_HEADER, size - 8):
            raise broken(f"its header claims {length} bytes of {size}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=distinct_keys)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in dict(metadata).values()):
            raise ValueError("its metadata are no strings")
        entries = {name: _entry(path, name, spec, 8 + length) for name, spec in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise broken(f"its header cannot be read ({error})") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise broken(f"tensor {name} starts at byte {entry.start}, expected {end}")
        end = entry.stop
    if end != size:
        raise broken(f"its tensors end at byte {end}, the file at byte {size}")
    return entries


def _entry(path: Path, name: str, spec: dict, offset: int) -> Entry:
    start, stop = spec["data_offsets"]
    shape = tuple(spec["shape"])
    if spec["dtype"] not in BYTES:
        raise ValueError(f"tensor {name} has dtype {spec['dtype']}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has a size that is no whole number")
    if stop - start != math.prod(shape) * BYTES[spec["dtype"]]:
        raise ValueError(f"tensor {name} of shape {list(shape)} holds {stop - start} bytes")
    return Entry(path, spec["dtype"], shape, offset + start, offset + stop)


def read_json(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes."""
    with path.open("rb") as file:
        data = file.read(most + 1)
    try:
        if len(data) > most:
            raise ValueError(f"it has more than {most} bytes")
        value = json.loads(data.decode(), object_pairs_hook=distinct_keys)
        if not isinstance(value, dict) or _depth(value) > MAX_DEPTH:
            raise ValueError(f"expected an object at most {MAX_DEPTH} deep, found {short(value)}")
    except (ValueError, RecursionError) as error:
        raise damaged(f"{path} cannot be used: {error}") from None
    return value


def _depth(value: object) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, items), default=0)


def regular_file(folder: Path, name: str) -> Path:
    """The path of a regular file in `folder`, or of a link from there into its hub cache."""
    path, home = folder / name, folder.resolve()
    try:
        real = Path(os.path.realpath(path, strict=True))
    except OSError as error:
        raise damaged(f"{path} cannot be found: {error.strerror}") from None
    # Checked before it is opened, for opening a pipe or a device may never return.
    if not real.is_file() or not os.access(real, os.R_OK):
        raise MoefyError(f"{path} is not a regular file that can be read; put one in its place")
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in roots):
        raise MoefyError(f"{path} links to {str(real)!r} outside its folder; copy the file there")
    return path


def distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An `object_pairs_hook` for JSON that raises ValueError for a duplicate key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("it has a duplicate key")
    return result


def some(names: list[str], most: int = 3) -> str:
    """The first of the names, and how many more there are."""
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
