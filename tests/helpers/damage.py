"""What can be done to a whole checkpoint of two layers, each with words that say what it was."""

import json
import os
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = QUERY.replace("q_proj", "k_proj")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Damage:
    """Done to a folder when called."""

    words: str
    do: Callable[[Path], object]

    def __call__(self, folder: Path) -> None:
        self.do(folder)


def write(name: str, data: bytes | str) -> Damage:
    """Replace a whole file."""
    value = data if isinstance(data, bytes) else data.encode()
    return Damage(
        f"{name} replaced by {short(data)}", lambda folder: (folder / name).write_bytes(value)
    )


def append(name: str, data: bytes) -> Damage:
    return Damage(
        f"{len(data)} bytes put behind {name}",
        lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + data),
    )


def cut(name: str, length: int) -> Damage:
    return Damage(
        f"{name} cut after {length:,} bytes",
        lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length]),
    )


def remove(*names: str) -> Damage:
    return Damage(
        f"without {', '.join(names)}", lambda folder: [(folder / name).unlink() for name in names]
    )


def moved(name: str, to: str) -> Damage:
    return Damage(f"{name} renamed {to}", lambda folder: shutil.move(folder / name, folder / to))


def then(*steps: Damage) -> Damage:
    return Damage(
        "; ".join(step.words for step in steps), lambda folder: [step(folder) for step in steps]
    )


def config(file: str = CONFIG, **changes: object) -> Damage:
    """Change keys of config.json; `...` removes a key."""

    def do(folder: Path) -> None:
        value = json.loads((folder / file).read_text()) | changes
        kept = {key: item for key, item in value.items() if item is not ...}
        (folder / file).write_text(json.dumps(kept))

    words = ", ".join(
        f"without {key}" if item is ... else f"{key} = {short(item)}"
        for key, item in changes.items()
    )
    return Damage(f"{file}: {words}", do)


def other_config(**value: object) -> Damage:
    return Damage(
        f"config.json of {short(value)} alone",
        lambda folder: (folder / CONFIG).write_text(json.dumps(value)),
    )


def tensor(name: str, change: Any = None, words: str = "") -> Damage:
    """Change one tensor, with a function or a new value, or remove it."""

    def do(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        value = change(stored[name]) if callable(change) else change
        stored = {key: item for key, item in stored.items() if key != name}
        stored |= {} if value is None else {name: value.contiguous()}
        save_file(stored, folder / SINGLE, metadata={"format": "pt"})

    said = words or (f"{name} added" if isinstance(change, torch.Tensor) else f"without {name}")
    return Damage(said if name in said else f"{name}: {said}", do)


def renamed(words: str, change: Callable[[str], str]) -> Damage:
    """Give every tensor another name."""

    def do(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        stored = {change(name): value for name, value in stored.items()}
        save_file(stored, folder / SINGLE, metadata={"format": "pt"})

    return Damage(words, do)


def before(prefix: str) -> Damage:
    """Put something before every tensor's name, as a wrapper does."""
    return renamed(f"{prefix} before all names", lambda name: prefix + name)


bare = renamed("names of the base class", lambda name: name.removeprefix("model."))


def header(words: str, change: Callable[[dict], object]) -> Damage:
    """Change the header of the single file, which safetensors' own writer would not write so."""

    def do(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        value = json.loads(data[8 : 8 + length])
        change(value)
        text = json.dumps(value).encode()
        text += b" " * (-len(text) % 8)
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return Damage(f"header: {words}", do)


def _huge_header(folder: Path) -> None:
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # sparse: no disk is used


huge_header = Damage("a header length of 100,000,001 before as many zero bytes", _huge_header)
random_bytes = Damage(
    f"{SINGLE} replaced by 5,000 random bytes",
    lambda folder: (folder / SINGLE).write_bytes(random.Random(0).randbytes(5_000)),
)


def _split(folder: Path) -> None:
    stored = load_file(folder / SINGLE)
    names = sorted(stored)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file({name: stored[name] for name in part}, folder / shard, metadata={"format": "pt"})
    where = {name: SHARDS[name in parts[1]] for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / SINGLE).unlink()


split = Damage("saved as two shards", _split)


def sharded(*steps: Damage) -> Damage:
    return then(split, *steps)


def index(words: str, change: Callable[[dict], object]) -> Damage:
    """Split, then change the index's weight map in place."""

    def do(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        change(value["weight_map"])
        (folder / INDEX).write_text(json.dumps(value))

    return sharded(Damage(f"index: {words}", do))


def elsewhere(name: str) -> Damage:
    """Make the index name the file `name`, which is a whole shard outside the folder."""

    def do(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / SHARDS[1], outside)
        target = name.replace("ABSOLUTE", str(outside))
        (folder / INDEX).write_text((folder / INDEX).read_text().replace(SHARDS[1], target))

    return sharded(Damage(f"index names {name!r}, the shard lies in the parent folder", do))


def link(name: str, to: str, *, move: bool = False) -> Damage:
    """Put a link in a file's place; with `move` the file goes to where the link leads."""

    def do(folder: Path) -> None:
        place = folder / to
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, place) if move else (folder / name).unlink()
        (folder / name).symlink_to(place)

    return Damage(f"{name} is a link to {to}", do)


def special(name: str, what: str, make: Callable[[Path], object]) -> Damage:
    """Put something that is no regular file in a file's place."""

    def do(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return Damage(f"{name} is {what}", do)


def pipe(name: str) -> Damage:
    return special(name, "a named pipe", os.mkfifo)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have about 100 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _own_code(folder: Path) -> None:
    (folder / "model.py").write_text("open('it-ran', 'w')\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config(auto_map={key: "model.Model" for key in names})(folder)


code_of_its_own = Damage("auto_map names a class in model.py beside it", _own_code)


def cached(folder: Path) -> None:
    """Lay the folder out as the hub cache does: every file a link to a blob beside `snapshots`."""
    blobs = folder.parent / "models--owner--name" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    folder.rmdir()
    folder.symlink_to(snapshot)


hub_cache = Damage("every file a link into the blobs of a hub cache", cached)


def first_value(value: float, count: int = 3) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(matrix: torch.Tensor) -> torch.Tensor:
        matrix[0, :count] = value
        return matrix

    return change


def flip_bit(name: str, element: int, bit: int) -> Damage:
    """Flip one bit of one float32 value."""

    def change(matrix: torch.Tensor) -> torch.Tensor:
        words = matrix.view(torch.int32).view(-1)
        words[element] ^= 1 << bit
        return matrix

    return tensor(name, change, f"bit {bit} of value {element} flipped")


def quantised(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix * 30).to(torch.int8)


def piece(letter: str, number: int) -> Damage:
    """Give a frequent letter an id for which the model has no embedding."""

    def do(folder: Path) -> None:
        file = folder / "tokenizer.json"
        value = json.loads(file.read_text())
        value["model"]["vocab"][letter] = number
        file.write_text(json.dumps(value))

    return Damage(f"tokenizer.json: {letter!r} has id {number}", do)


def more_pieces(count: int) -> Damage:
    """A tokenizer of `count` pieces more than the model has embeddings."""

    def do(folder: Path) -> None:
        file = folder / "tokenizer.json"
        value = json.loads(file.read_text())
        vocab = value["model"]["vocab"]
        vocab |= {f"piece{n}": len(vocab) + n for n in range(count)}
        file.write_text(json.dumps(value))

    return Damage(f"tokenizer.json: {count} pieces more than embeddings", do)
