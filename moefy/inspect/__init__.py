"""What a checkpoint is and what it can become, from its configuration and headers alone.

`open_checkpoint` stops at the first problem; this reads all it can, and lists the problems beside
it. It does not import transformers, which takes seconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moefy.checkpoint.resolve import resolve
from moefy.errors import MoefyError
from moefy.files.safetensors_header import CONFIG, Entry, contradiction, read_config, read_entries

Config = Mapping[str, Any]
Entries = Mapping[str, Entry]

SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim", "d_kv"),
    "vocabulary": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}
"""Our name of a size -> its names in configurations."""

MISREAD = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""The exceptions of reading a value of the wrong kind."""

INSIDE = ("text_config", "dense")
"""Keys that may hold the configuration of the language model."""

COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")
"""Tensors that old versions stored and that are not parameters."""

FFN = re.compile(
    r"\.(mlp|feed_forward|ffn|block_sparse_moe|shared_mlp|fc[12]|DenseReluDense)\."
    r"|\d\.(intermediate|output)\.dense\."
)
"""Tensors of a feed-forward block: router, experts and shared experts included."""


def describe(model: str, *, revision: str | None = None) -> dict[str, Any]:
    """The facts that `moefy inspect` prints of `model`, ready for JSON.

    `problems` are lines; `code` is the exit code of the first, 0 if there is none.

    Raises:
        MoefyError: code 3 when there is no model, or no configuration that can be read.
    """
    folder = resolve(model, revision=revision, fetch=False)
    config = _flat(read_config(folder))
    problems: list[MoefyError] = []
    try:
        entries = read_entries(folder)
    except MoefyError as error:
        entries, problems = {}, [error]
    if not entries and not isinstance(config.get("model_type"), str):
        raise MoefyError(f"{folder} holds neither a model_type nor tensors that can be read")
    from moefy.inspect import dense, moe

    kind = moe if moe.is_moe(config, entries) else dense
    classes = config.get("architectures")
    result = {
        "model": Path(model).absolute().name if Path(model).is_dir() else model,
        "path": str(folder),
        "kind": "MoE" if kind is moe else "dense",
        "model_type": config.get("model_type"),
        "architectures": classes if isinstance(classes, list) else [],
        "sizes": {name: number(config, keys) for name, keys in SIZES.items()},
        **_tensors(entries),
    }
    details = kind.describe(folder, config, entries)
    codes = {str(problem): problem.code for problem in (*problems, *details["problems"])}
    return {
        **result,
        **details,
        "sizes": {**result["sizes"], **details.get("sizes", {})},
        "problems": [*codes],
        "code": next(iter(codes.values()), 0),
    }


def misread(folder: Path, error: Exception) -> MoefyError:
    """The problem of a configuration with a value of the wrong kind."""
    reason = f"{type(error).__name__}: {error}"
    return contradiction(f"{folder / CONFIG} cannot be understood: {reason}")


def _flat(config: Config) -> dict[str, Any]:
    """A configuration together with the keys of the model inside it, if there is one."""
    inside = next((config[key] for key in INSIDE if isinstance(config.get(key), dict)), {})
    return {**inside, **config}


def number(config: Config, keys: tuple[str, ...]) -> int | None:
    """The value of the first key that holds a number above 0, of all layers or of the first."""
    for key in keys:
        value = config.get(key)
        # One for each layer, in some classes.
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and value > 0:
            return value
    return None


def head_dim(config: Config, entries: Entries) -> int | None:
    """The width of an attention head, from the tensors: classes differ in their defaults."""
    heads, configured = number(config, SIZES["heads"]), number(config, SIZES["head_dim"])
    if heads is None:
        return configured
    # Not by the queries first: in some classes they are stored with gates.
    for ending in ("self_attn.o_proj.weight", "self_attn.q_proj.weight"):
        for name, entry in entries.items():
            if name.endswith(ending) and len(entry.shape) == 2:
                return entry.shape[1 if "o_proj" in ending else 0] // heads
    return configured or (number(config, SIZES["hidden"]) or 0) // heads or None


def _tensors(entries: Entries) -> dict[str, Any]:
    """What is stored: parameters, dtypes and files."""
    counted = {name: e.num_elements for name, e in entries.items() if not COMPUTED.search(name)}
    total = sum(counted.values())
    ffn = sum(number for name, number in counted.items() if FFN.search(name))
    files = {entry.file for entry in entries.values()}
    return {
        "parameters": total,
        "parameters_active": total,
        "parameters_ffn": ffn,
        "ffn_share": round(ffn / total, 4) if total else None,
        "dtypes": dict(Counter(entry.dtype for entry in entries.values()).most_common()),
        "disk_bytes": sum(file.stat().st_size for file in files),
        "shards": len(files),
    }
