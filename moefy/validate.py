"""Is this folder a dense checkpoint that can be converted? Asked before any work begins.

`open_checkpoint` reads configuration and headers, `check_tensors` compares them with the stock
class, `scan_finite` looks at values as they pass, `check_target` tells which engines will balk.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from moefy import families
from moefy.checkpoint import Checkpoint, Entry, distinct_keys, read_header
from moefy.errors import MoefyError
from moefy.families.family import Family
from moefy.layout import ACTIVATIONS, Shape
from moefy.targets.target import Target

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG, MAX_INDEX, MAX_DEPTH = 1_000_000, 32_000_000, 50
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()
Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
FLOATS = ("F64", "F32", "F16", "BF16")
IGNORABLE = re.compile(r"\.rotary_emb\.inv_freq$")
"""What old versions stored, and every model class computes itself and ignores."""

KINDS = {
    "already a Mixture of Experts": "expert",
    "a state-space or recurrent model": "state_size|ssm_|mamba|rwkv",
    "an encoder or an encoder-decoder": "is_encoder_decoder|type_vocab_size|MaskedLM",
    "several models in one, of which text is a part": "(text|vision|audio)_config",
}
"""What an unsupported configuration is, by what its keys, type and architectures contain."""

NO_DENSE_LAYERS = {"qwen2_moe": "llama.cpp, SGLang and MLX", "qwen3_moe": "llama.cpp"}
"""Engines that cannot load a class when some of its layers are dense."""


def _damaged(message: str) -> MoefyError:
    return MoefyError(f"{message}; fetch it again (hf download)")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and headers of a dense checkpoint; build no module and run no code.

    Raises:
        MoefyError: code 3 when the files are damaged, incomplete, contradict each other or lie
            outside the folder; code 4 when they are whole but of a kind that moefy cannot convert.
    """
    path = regular_file(folder, CONFIG)
    config = _read_json(path, MAX_CONFIG)
    if reason := _unsupported(path, config):
        raise MoefyError(f"{path} cannot be converted: {reason}", code=4)
    if reason := _wrong_size(config):
        raise _damaged(f"{path} is wrong: {reason}")
    entries = _entries(folder)
    for name, entry in entries.items():
        if entry.dtype not in FLOATS and not IGNORABLE.search(name):
            found = f"tensor {name!r} in {entry.file} is stored as {entry.dtype}"
            raise MoefyError(f"{found}, expected floating point; dequantise it first", code=4)
    _check_layers(path, config, entries)
    return Checkpoint(folder, config, entries)


def _read_json(path: Path, most: int) -> dict[str, Any]:
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
        raise _damaged(f"{path} cannot be used: {error}") from None
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
        raise _damaged(f"{path} cannot be found: {error.strerror}") from None
    # Asked before it is opened, for opening a pipe or a device may never return.
    if not real.is_file() or not os.access(real, os.R_OK):
        raise _damaged(f"{path} is not a regular file that can be read")
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(root) for root in roots):
        raise MoefyError(f"{path} links to {str(real)!r} outside its folder; copy the file there")
    return path


def _unsupported(path: Path, config: Config) -> str | None:
    """Why a configuration, whole or not, is of a kind that cannot be converted; None if it can."""
    if config.get("auto_map"):
        return "it needs code of its own (auto_map), which is never run"
    # transformers would fetch and run a kernel from the hub under a name with a slash.
    if any("/" in str(config[key]) for key in config if key.endswith("_implementation")):
        return "it needs a kernel of its own (attn_implementation), which is never run"
    if config.get("quantization_config") or config.get("quantization"):
        return "it is quantised (quantization_config); dequantise it first"
    model_type, known = config.get("model_type"), families.names()
    if not isinstance(model_type, str):
        raise _damaged(f"{path} has no model_type, expected one of {', '.join(known)}")
    if model_type not in known:
        marks = f"{model_type} {config.get('architectures')} {[k for k, v in config.items() if v]}"
        kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, marks)]
        near = [] if kinds else difflib.get_close_matches(model_type, known, n=1)
        found = f"model_type {short(model_type)} is {[*kinds, 'unknown'][0]}"
        guess = f"; the nearest is {near[0]}" if near else ""
        return f"{found}; supported dense families: {', '.join(known)}{guess}"
    if str(activation := config.get("hidden_act", "silu")) not in ACTIVATIONS:
        return f"hidden_act is {short(activation)}, expected one of {', '.join(ACTIVATIONS)}"
    return families.load(model_type).refuse(dict(config))


def _wrong_size(config: Config) -> str | None:
    """Which size in a configuration no model can have, whatever the tensors say."""
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
    for key in (*SIZES, *optional):
        value = config.get(key)
        if type(value) is not int or value < 1:
            return f"{key} is {short(value)}, expected a whole number above 0"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads > hidden or heads % groups:
        most = f"at most {short(hidden)} and a multiple of num_key_value_heads, {short(groups)}"
        return f"num_attention_heads is {short(heads)}, expected {most}"
    return None


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint, as the headers of its shards have it."""
    found = [name for name in (SINGLE, INDEX) if os.path.lexists(folder / name)]
    if not found:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
        only = f", only pickles ({_some(pickles)}), never opened: convert with save_pretrained()"
        raise MoefyError(f"{folder} holds no {SINGLE} and no {INDEX}{only if pickles else ''}")
    if len(found) == 2:
        raise MoefyError(f"{folder} holds {SINGLE} and {INDEX}: ambiguous; remove the stale one")
    if found == [SINGLE]:
        return read_header(regular_file(folder, SINGLE))
    index = _weight_map(regular_file(folder, INDEX))
    shards = sorted(set(index.values()))
    if missing := [name for name in shards if not os.path.lexists(folder / name)]:
        raise _damaged(f"{folder} lacks {_some(missing, 200)}")
    entries: dict[str, Entry] = {}
    for shard in shards:
        header = read_header(regular_file(folder, shard))
        if twice := sorted(header.keys() & entries.keys()):
            raise _damaged(f"{folder / shard} and another shard both hold {_some(twice)}")
        entries |= header
    if odd := sorted(entries.keys() ^ index.keys()):
        place = "listed but in no shard" if odd[0] in index else "in a shard but not listed"
        raise _damaged(f"{folder / INDEX} does not fit its shards: {odd[0]!r} is {place}")
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor as the index has it: plain names in the index's own folder."""
    index = _read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise _damaged(f"{path} has no weight_map, or an empty one")
    for name in index.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.+ -]+\.safetensors", name):
            allowed = "for security only *.safetensors files beside it are read"
            raise _damaged(f"{path} names the file {short(name)}, but {allowed}")
    return index


def _check_layers(path: Path, config: Config, entries: Mapping[str, Entry]) -> None:
    """Compare the sizes in the configuration with the layers, FFNs and embedding that are there."""
    family = families.load(config["model_type"])
    hidden, neurons, num_layers = (config[key] for key in SIZES[:3])
    layer = re.compile(re.escape(family.layer).replace(r"\{layer\}", "([0-9]+)"))
    stored = {match[1] for match in map(layer.match, entries) if match}
    if len(stored) != num_layers:
        found = f"{path}: num_hidden_layers is {short(num_layers)}"
        raise _damaged(f"{found}, but {len(stored)} layers are stored")
    expected = {family.embedding: (config["vocab_size"], hidden)}
    for number in range(num_layers):
        gate, up, down = family.ffn_names(number)
        expected |= {gate: (neurons, hidden), up: (neurons, hidden), down: (hidden, neurons)}
    _check_shapes(path, expected, entries)


def _check_shapes(path: Path, expected: Shapes, entries: Mapping[str, Entry]) -> None:
    if missing := [name for name in expected if name not in entries]:
        raise _damaged(f"{path.parent} lacks tensors that {path.name} implies: {_some(missing)}")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            found = f"tensor {name} in {entries[name].file} has shape {list(entries[name].shape)}"
            raise _damaged(f"{found}, but {path.name} implies {list(shape)}")


def _some(names: list[str], most: int = 3) -> str:
    shown = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_tensors(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Compare all names and shapes with the stock dense class, built without memory; give notes.

    Raises:
        MoefyError: code 3 for a tensor that is missing, has another shape or is unknown to the
            class, and for a configuration of which transformers cannot make a model.
    """
    folder, entries = checkpoint.folder, checkpoint.entries
    expected, tied = _implied(checkpoint)
    if tied and family.head not in entries:
        del expected[family.head]
    _check_shapes(folder / CONFIG, expected, entries)
    extra = [name for name in entries if name not in expected]
    if unknown := [name for name in extra if not IGNORABLE.search(name)]:
        found = f"{folder} holds tensors that {family.model_type} does not have: {_some(unknown)}"
        raise MoefyError(f"{found}; merge adapters first, or remove these tensors")
    notes = [f"ignored by {family.model_type} and every target: {_some(extra)}"] if extra else []
    if tied and family.head in entries:
        pair = [checkpoint.tensor(name) for name in (family.head, family.embedding)]
        if not torch.equal(*(tensor.view(torch.uint8) for tensor in pair)):
            notes.append(f"tied by {CONFIG}, but {family.head} differs: the weights are followed")
    return notes


def _implied(checkpoint: Checkpoint) -> tuple[Shapes, bool]:
    """Names and shapes of the stock class's tensors, and whether it ties head and embedding."""
    # Here, because these take seconds that `open_checkpoint` need not wait for.
    from transformers import AutoModelForCausalLM

    from moefy.walk import model_config

    try:
        config = model_config(checkpoint)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # whatever a value of the configuration makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found = f"transformers can make no model of {checkpoint.folder / CONFIG}"
        raise _damaged(f"{found}: {reason}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, bool(config.tie_word_embeddings)


def scan_finite(name: str, tensor: Tensor, *, ffn: bool = False) -> None:
    """Refuse, with code 3, NaN and infinity, and with `ffn` a matrix of nothing but zeros."""
    # In pieces: what is compared on the way is several times the size of the tensor.
    pieces = tensor.reshape(-1).split(1 << 22)
    if bad := tensor.numel() - sum(int(torch.isfinite(piece).sum()) for piece in pieces):
        raise _damaged(f"tensor {name}: {bad} of {tensor.numel()} values are NaN or infinite")
    if ffn and not any(piece.any() for piece in pieces):
        raise _damaged(f"tensor {name} is all zeros")


def check_target(config: Config, target: Target, shape: Shape, num_converted: int) -> list[str]:
    """What engines will not do with the result of converting `num_converted` dense layers."""
    notes = []
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    if target.model_type == "qwen2_moe" and heads * head_dim != hidden:
        notes.append(f"vLLM and llama.cpp assume head_dim {hidden / heads:g}, not {head_dim}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        notes.append(f"llama.cpp may ignore rope_type {rope_type}, and MLX refuse to load it")
    window = config.get("use_sliding_window", True) and config.get("sliding_window")
    types = config.get("layer_types") or ["sliding_attention"]
    if window and "sliding_attention" in types:
        engines = "llama.cpp and MLX" if len(set(types)) == 1 else "vLLM, llama.cpp and MLX"
        notes.append(f"{engines} ignore the sliding window: wrong past {window} tokens")
    num_dense = config["num_hidden_layers"] - num_converted
    if num_dense and (engines := NO_DENSE_LAYERS.get(target.model_type)):
        notes.append(f"{engines} cannot load a model with dense layers, and {num_dense} stay dense")
    if shape.expert_width % 128:
        found = f"expert width {shape.expert_width}, no multiple of 128"
        notes.append(f"fused kernels of vLLM and SGLang may refuse {found}, or be slow")
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        notes.append(f"vLLM, SGLang and llama.cpp run silu only, not {activation}")
    return notes if target.model_type != "dense" else []
