"""Is this folder a dense checkpoint that can be converted? Asked before any work begins.

`open_checkpoint` reads configuration and headers, `check_tensors` compares them with the stock
class. Values are looked at by `scan`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from moefy import families
from moefy.checkpoint import Checkpoint
from moefy.errors import MoefyError
from moefy.families.family import Family
from moefy.headers import (
    ADAPTER,
    CONFIG,
    MAX_INDEX,
    Entry,
    damaged,
    read_config,
    read_entries,
    read_json,
    regular_file,
    some,
)
from moefy.layout import ACTIVATIONS

SIZES = "hidden_size num_hidden_layers num_attention_heads vocab_size".split()
KEEP = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "generation_config.json",
    "LICENSE",
    "LICENCE",
    "NOTICE",
)
"""How the names of the files begin that are copied."""

SETTINGS = ("tokenizer_config.json", "generation_config.json")
MOST_LABELS = 10**6
Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
FLOATS = ("F64", "F32", "F16", "BF16")
KINDS = {
    "already a Mixture of Experts": "expert",
    "a state-space or recurrent model": "state_size|ssm_|mamba|rwkv|recurrent",
    "an encoder or an encoder-decoder": "is_encoder_decoder|type_vocab_size|MaskedLM|bert",
    "several models in one, of which text is a part": "(text|vision|audio)_config",
}
"""What an unsupported configuration is, by what its keys, type and architectures contain."""


def open_checkpoint(folder: Path, *, ignore_index: bool = False) -> Checkpoint:
    """Read the configuration and headers of a dense checkpoint; build no module and run no code.

    With `ignore_index` an index names the files, and they say themselves what they hold.

    Raises:
        MoefyError: code 3 when the files are damaged, incomplete, contradict each other or lie
            outside the folder; code 4 when they are whole but of a kind that moefy cannot convert.
    """
    path, config = folder / CONFIG, read_config(folder)
    if reason := _unsupported(path, config):
        raise MoefyError(f"{path} cannot be converted: {reason}", code=4)
    family = families.load(config["model_type"], config)
    config = family.sized(config)
    if reason := _wrong_size(config):
        raise damaged(f"{path} is wrong: {reason}")
    stored = read_entries(folder, ignore_index=ignore_index)
    entries = {family.named(name): entry for name, entry in stored.items()}
    for name, entry in entries.items():
        if entry.dtype not in FLOATS and not re.search(family.unread, name):
            found = f"tensor {name!r} in {entry.file} is stored as {entry.dtype}"
            raise MoefyError(f"{found}, expected floating point; dequantise it first", code=4)
    _check_layers(path, config, entries)
    return Checkpoint(folder, config, entries)


def _unsupported(path: Path, config: Config) -> str | None:
    """Why a configuration, whole or not, is of a kind that cannot be converted; None if it can."""
    if config.get("auto_map"):
        return f"it brings code of its own (auto_map), which is never run{_stock(config)}"
    # transformers would fetch and run a kernel from the hub under a name with a slash.
    if any("/" in str(config[key]) for key in config if "_implementation" in key):
        return "it needs a kernel of its own (attn_implementation), which is never run"
    # transformers would open these in the place of the weights that are converted.
    if config.get("transformers_weights"):
        return "it names weights of its own (transformers_weights); rename them model.safetensors"
    if os.path.lexists(path.with_name(ADAPTER)):
        return f"an adapter lies beside it ({ADAPTER}); merge it first (merge_and_unload)"
    if config.get("quantization_config") or config.get("quantization"):
        return "it is quantised (quantization_config); dequantise it first"
    model_type, known = config.get("model_type"), families.names()
    if not isinstance(model_type, str):
        raise damaged(f"{path} has no model_type, expected one that `moefy families` lists")
    if model_type not in known:
        marks = f"{model_type} {config.get('architectures')} {[k for k, v in config.items() if v]}"
        kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, marks)]
        near = [] if kinds else difflib.get_close_matches(model_type, known, n=1)
        found = f"model_type {short(model_type)} is {[*kinds, 'unknown'][0]}"
        guess = f"; the nearest is {near[0]}" if near else ""
        return f"{found}; `moefy families` lists the {len(known)} that are supported{guess}"
    family = families.load(model_type, config)
    if str(activation := config.get(family.activation, "silu")) not in ACTIVATIONS:
        found = f"{family.activation} is {short(activation)}"
        return f"{found}, expected one of {', '.join(ACTIVATIONS)}"
    both = "ForSeq2SeqLM" in family.tasks
    if bool(config.get("is_encoder_decoder", both)) != both:
        return f"is_encoder_decoder is {not both}, which no {model_type} is"
    return family.refuse(dict(config))


def beside(folder: Path) -> list[Path]:
    """The files beside the weights that a conversion copies, relative to the folder.

    Raises:
        MoefyError: code 3 for one that is no regular file, and for settings that cannot be read;
            code 4 where the tokenizer needs code of its own.
    """
    named = [file for file in folder.iterdir() if file.name.startswith(KEEP)]
    found = sorted([*named, *folder.glob("additional_chat_templates/*.jinja")])
    files = [file.relative_to(folder) for file in found if file.suffix != ".py"]
    for file in files:
        path = regular_file(folder, str(file))
        if file.name in SETTINGS and read_json(path, MAX_INDEX).get("auto_map"):
            reason = "it needs code of its own (auto_map), which is never run"
            raise MoefyError(f"{path} cannot be used: {reason}", code=4)
    return files


def _stock(config: Config) -> str:
    """What to do where transformers has a class of that name, and the code may be a copy of it."""
    if config.get("model_type") not in families.names():
        return ""
    return f"; if it is a plain {config['model_type']} all the same, take auto_map out of {CONFIG}"


def _wrong_size(config: Config) -> str | None:
    """Which size in a configuration no model can have, whatever the tensors say."""
    family = families.load(config["model_type"], config)
    optional = ["num_key_value_heads", "head_dim", *([family.width] if family.neurons else [])]
    optional = [key for key in optional if config.get(key) is not None]
    for key in (*SIZES, *optional, *([] if family.neurons else [family.width])):
        value = config.get(key)
        if type(value) is not int or value < 1:
            return f"{key} is {short(value)}, expected a whole number above 0"
    try:
        neurons = family.num_neurons(config)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        return f"the number of FFN neurons ({family.width}) cannot be told: {error!r}"
    if neurons < 1:
        return f"the number of FFN neurons ({family.width}) is {short(neurons)}"
    labels = config.get("num_labels")  # of which transformers makes a table
    if labels is not None and not (type(labels) is int and 0 <= labels <= MOST_LABELS):
        return f"num_labels is {short(labels)}, expected a whole number up to {MOST_LABELS}"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads > hidden or heads % groups:
        most = f"at most {short(hidden)} and a multiple of num_key_value_heads, {short(groups)}"
        return f"num_attention_heads is {short(heads)}, expected {most}"
    return None


def _check_layers(path: Path, config: Config, entries: Mapping[str, Entry]) -> None:
    """Compare the sizes in the configuration with the layers, FFNs and embedding that are there."""
    family = families.load(config["model_type"], config)
    hidden, num_layers, neurons = (*(config[k] for k in SIZES[:2]), family.num_neurons(config))
    layer = re.compile(re.escape(family.layer).replace(r"\{layer\}", "([0-9]+)"))
    stored = {match[1] for match in map(layer.match, entries) if match}
    if len(stored) != num_layers:
        found = f"{path}: num_hidden_layers is {short(num_layers)}"
        raise damaged(f"{found}, but {len(stored)} layers are stored")
    expected = {family.embedding: (config["vocab_size"], config.get("embedding_size") or hidden)}
    shapes = family.shapes(neurons, hidden)
    for number in range(num_layers):
        expected |= dict(zip(family.ffn_names(number), shapes, strict=True))
        expected |= _attention(config, family.layer.format(layer=number) + "self_attn.", entries)
    _check_shapes(path, expected, entries)


def _attention(config: Config, prefix: str, entries: Mapping[str, Entry]) -> Shapes:
    """Shapes of a layer's projections, as far as they have their usual names.

    Heads are as wide as in the queries where the configuration does not say; keys and values are
    left out where it does not say how many there are, for the defaults of the classes differ.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads")
    queries = heads * (2 if families.load(config["model_type"], config).gated_heads else 1)
    units = {"q_proj": queries, **({"k_proj": groups, "v_proj": groups} if groups else {})}
    if f"{prefix}qkv_proj.weight" in entries:
        units = {"qkv_proj": heads + 2 * (groups or heads)}
    first, count = next(iter(units.items()))
    if f"{prefix}{first}.weight" not in entries:
        return {}
    width = config.get("head_dim") or entries[f"{prefix}{first}.weight"].shape[0] // count
    expected = {f"{prefix}{part}.weight": (n * width, hidden) for part, n in units.items()}
    out = f"{prefix}o_proj.weight"  # as wide as the heads, with or without their gates
    return expected | ({out: (hidden, heads * width)} if out in entries else {})


def _check_shapes(path: Path, expected: Shapes, entries: Mapping[str, Entry]) -> None:
    if missing := [name for name in expected if name not in entries]:
        raise damaged(f"{path.parent} lacks tensors that {path.name} implies: {some(missing)}")
    for name, shape in expected.items():
        if entries[name].shape != shape:
            found = f"tensor {name} in {entries[name].file} has shape {list(entries[name].shape)}"
            raise damaged(f"{found}, but {path.name} implies {list(shape)}")


def check_tensors(checkpoint: Checkpoint, family: Family) -> tuple[Checkpoint, list[str]]:
    """Compare all names and shapes with the stock dense class, built without memory.

    Gives the checkpoint less what the class does not read, and notes.

    Raises:
        MoefyError: code 3 for a tensor that is missing, has another shape or is unknown to the
            class, and for a configuration of which transformers cannot make a model.
    """
    import torch

    folder, entries = checkpoint.folder, checkpoint.entries
    expected, tied = _implied(checkpoint, family)
    _check_shapes(folder / CONFIG, _less(expected, tied - entries.keys()), entries)
    extra = [name for name in entries if name not in expected]
    if unknown := [name for name in extra if not re.search(family.unread, name)]:
        found = f"{folder} holds tensors that {family.model_type} does not have: {some(unknown)}"
        raise MoefyError(f"{found}; merge adapters first, or remove these tensors")
    notes = [f"not read by {family.model_type}, not written: {some(extra)}"] if extra else []
    said = checkpoint.config.get("tie_word_embeddings", True)  # T5 ties whatever is said
    if said and family.head in tied and family.head in entries:
        pair = [checkpoint.tensor(name) for name in (family.head, family.embedding)]
        if not torch.equal(*(tensor.view(torch.uint8) for tensor in pair)):
            notes.append(f"tied by {CONFIG}, but {family.head} differs: the weights are followed")
    return dataclasses.replace(checkpoint, entries=_less(entries, extra)), notes


def _less(table: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name not in names}


def _implied(checkpoint: Checkpoint, family: Family) -> tuple[Shapes, set[str]]:
    """Names and shapes of the stock class's tensors, and which of them are others again."""
    # Here, because these take seconds that `open_checkpoint` need not wait for.
    import torch

    from moefy.walk import auto_class, model_config

    task = family.task(checkpoint.config)
    try:
        config = model_config(checkpoint)
        with torch.device("meta"):
            model = auto_class(task).from_config(config, attn_implementation="eager")
    except Exception as error:  # whatever a value of the configuration makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        found = f"transformers can make no model of {checkpoint.folder / CONFIG}"
        raise damaged(f"{found}: {reason}") from error
    whole = model.base_model_prefix + "."
    prefix = whole if task == "Model" and family.layer.startswith(whole) else ""
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
