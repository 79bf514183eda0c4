"""Check before any work that a folder is a dense checkpoint that can be converted.

`open_checkpoint` reads configuration and headers; `check_tensors` compares them with the stock
class. `check_finite.scan` checks the values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from moefy.checkpoint import tensor_names
from moefy.checkpoint.supported import IMPLEMENTATION, SIZES, not_plain, unsupported, wrong_size
from moefy.checkpoint.tensors import Checkpoint
from moefy.errors import MoefyError
from moefy.files import safetensors_header as headers
from moefy.models import families
from moefy.models.families.family import Family

KEEP = (
    *("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template"),
    *("generation_config.json", "LICENSE", "LICENCE", "NOTICE"),
)
"""Beginnings of the names of files to copy."""

SETTINGS = ("tokenizer_config.json", "generation_config.json")
Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]
FLOATS = ("F64", "F32", "F16", "BF16")


def open_checkpoint(folder: Path, *, ignore_index: bool = False) -> Checkpoint:
    """Read the configuration and headers of a dense checkpoint; build no module and run no code.

    With `ignore_index` an index only names the files; their headers list the tensors.

    Raises:
        MoefyError: code 3 when the files are damaged, incomplete, contradict each other or lie
            outside the folder; code 4 for a whole model of a kind that moefy cannot convert.
    """
    path, config = folder / headers.CONFIG, headers.read_config(folder)
    if reason := unsupported(path, config):
        raise MoefyError(f"{path} cannot be converted: {reason}", code=4)
    family = families.load(config["model_type"], config)
    # The attention's code changes no result, and the one that is named may not be installed.
    config = {key: config[key] for key in config if IMPLEMENTATION not in key}
    config = family.sized(config)
    if reason := wrong_size(config):
        raise headers.contradiction(f"{path} is wrong: {reason}")
    stored = headers.read_entries(folder, ignore_index=ignore_index)
    tensor_names.check_names(folder, stored)
    names = tensor_names.class_names(family, stored)
    entries = {names[name]: entry for name, entry in stored.items()}
    for name, entry in entries.items():
        if entry.dtype not in FLOATS and not re.search(family.unread, name):
            problem = f"tensor {name!r} in {entry.file} is stored as {entry.dtype}"
            raise MoefyError(f"{problem}, expected floating point; dequantise it first", code=4)
    _check_layers(path, config, entries)
    if config.get("tie_word_embeddings") is False:  # the default is known to the class alone
        _check_head(path, config, entries)
    return Checkpoint(folder, config, entries)


def check_plain(folder: Path, *, ignore_index: bool = False) -> dict[str, headers.Entry]:
    """The tensors of a model of any kind that transformers can open to predict next tokens.

    Raises:
        MoefyError: code 3 for files that are damaged or no model, code 4 for a model that needs
            other files or code, or has another head.
    """
    path, config = folder / headers.CONFIG, headers.read_config(folder)
    if reason := not_plain(path, config) or tensor_names.other_task(config, ("ForCausalLM",)):
        raise MoefyError(f"{path} cannot be used: {reason}", code=4)
    entries = headers.read_entries(folder, ignore_index=ignore_index)
    tensor_names.check_names(folder, entries)
    untied = config.get("tie_word_embeddings") is False
    if untied and config.get("model_type") in families.names():
        family = families.load(config["model_type"], config)
        _check_head(path, config, tensor_names.class_names(family, entries).values())
    return entries


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights that a conversion copies, relative to the folder.

    Raises:
        MoefyError: code 3 for one that is no regular file, and for settings that cannot be read;
            code 4 where the tokenizer needs code of its own.
    """
    paths = [file for file in folder.iterdir() if file.name.startswith(KEEP)]
    paths = sorted([*paths, *folder.glob("additional_chat_templates/*.jinja")])
    files = [file.relative_to(folder) for file in paths if file.suffix != ".py"]
    for file in files:
        path = headers.regular_file(folder, str(file))
        if file.name in SETTINGS and headers.read_json(path, headers.MAX_INDEX).get("auto_map"):
            reason = "it needs code of its own (auto_map), which is never run"
            raise MoefyError(f"{path} cannot be used: {reason}", code=4)
    return files


def _check_layers(path: Path, config: Config, entries: Mapping[str, headers.Entry]) -> None:
    """Compare the sizes in the configuration with the stored layers, FFNs and embedding."""
    family = families.load(config["model_type"], config)
    hidden, num_layers, neurons = (*(config[k] for k in SIZES[:2]), family.num_neurons(config))
    layer = tensor_names.layer_pattern(family.layer)
    stored = {match[1] for match in map(layer.match, entries) if match}
    if not stored and (place := tensor_names.place_of_layers(family, entries)):
        own = family.layer.partition("{layer}")[0]
        problem = f"{path.parent} has layers under {place!r}, which {family.model_type} has under"
        advice = f"a wrapper of the model was saved; {tensor_names.INNER}"
        raise MoefyError(f"{problem} {own!r}: {advice}")
    if len(stored) != num_layers:
        problem = f"{path}: num_hidden_layers is {short(num_layers)}"
        raise headers.contradiction(f"{problem}, but {len(stored)} layers are stored")
    expected = {family.embedding: (config["vocab_size"], config.get("embedding_size") or hidden)}
    shapes = family.shapes(neurons, hidden)
    for number in range(num_layers):
        expected |= dict(zip(family.ffn_names(number), shapes, strict=True))
        expected |= _attention(config, family.layer.format(layer=number) + "self_attn.", entries)
    _check_shapes(path, expected, entries)


def _attention(config: Config, prefix: str, entries: Mapping[str, headers.Entry]) -> Shapes:
    """Shapes of a layer's projections, if they have their usual names.

    Without a head width in the configuration, the queries give it. Without a number of keys and
    values these are left out, for the classes' defaults differ.
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


def _check_head(path: Path, config: Config, names: Collection[str]) -> None:
    """Check that a language model has a head, or uses the embedding as one."""
    family = families.load(config["model_type"], config)
    if "ForCausalLM" not in family.tasks or family.head in names:
        return
    (name, *_) = tensor_names.architectures(config) or [""]
    base = name.endswith("Model") and not name.endswith("LMHeadModel")
    raise MoefyError(
        f"{path.parent} has no head ({family.head}), nor is the embedding the head "
        f"(tie_word_embeddings): {name if base else 'it'} predicts no next token; expected a "
        "language model",
        code=4 if base else 3,
    )


def _check_shapes(path: Path, expected: Shapes, entries: Mapping[str, headers.Entry]) -> None:
    if missing := [name for name in expected if name not in entries]:
        raise headers.contradiction(
            f"{path.parent} lacks tensors that {path.name} implies: {headers.some(missing)}"
        )
    for name, shape in expected.items():
        if entries[name].shape != shape:
            problem = f"tensor {name} in {entries[name].file} has shape {list(entries[name].shape)}"
            raise headers.contradiction(f"{problem}, but {path.name} implies {list(shape)}")


def check_tensors(checkpoint: Checkpoint, family: Family) -> tuple[Checkpoint, list[str]]:
    """Compare all names and shapes with the stock dense class, built without memory.

    Gives the checkpoint without the tensors that the class does not read, and notes.

    Raises:
        MoefyError: code 3 for a tensor that is missing, has another shape or is unknown to the
            class, and for a configuration from which transformers cannot build a model.
    """
    import torch

    folder, entries = checkpoint.folder, checkpoint.entries
    expected, tied = _implied(checkpoint, family)
    if family.head in expected and family.head not in tied:
        _check_head(folder / headers.CONFIG, checkpoint.config, entries)
    stored = {key: expected[key] for key in expected if key in entries or key not in tied}
    _check_shapes(folder / headers.CONFIG, stored, entries)
    extra = [name for name in entries if name not in expected]
    if unknown := [name for name in extra if not re.search(family.unread, name)]:
        problem = f"{folder} holds tensors that {family.model_type} does not have"
        advice = "if they are an adapter's, merge it; else remove them"
        raise MoefyError(f"{problem}: {headers.some(unknown)}; {advice}")
    notes = [f"not read by {family.model_type}, not written: {headers.some(extra)}"] * bool(extra)
    ties = checkpoint.config.get("tie_word_embeddings", True)  # T5 ignores the key
    if ties and family.head in tied and family.head in entries:
        pair = [checkpoint.tensor(name) for name in (family.head, family.embedding)]
        if not torch.equal(*(tensor.view(torch.uint8) for tensor in pair)):
            differs = f"{family.head} differs: the stored head is used"
            notes.append(f"tied by {headers.CONFIG}, but {differs}")
    read = {name: entry for name, entry in entries.items() if name in expected}
    return dataclasses.replace(checkpoint, entries=read), notes


def _implied(checkpoint: Checkpoint, family: Family) -> tuple[Shapes, set[str]]:
    """Names and shapes of the stock class's tensors, and which of them are tied."""
    # Imported here, for these take seconds that `open_checkpoint` need not wait for.
    import torch

    from moefy.checkpoint.model_config import model_config
    from moefy.models.load import auto_class, library_error

    task = family.task(checkpoint.config)
    try:
        config = model_config(checkpoint)
        with torch.device("meta"):
            model = auto_class(task).from_config(config, attn_implementation="eager")
    except Exception as error:  # transformers raises anything on a wrong value
        problem = f"transformers can make no model of {checkpoint.folder / headers.CONFIG}"
        raise library_error(problem, error, advice=f"correct {headers.CONFIG}") from error
    whole = model.base_model_prefix + "."
    prefix = whole if task == "Model" and family.layer.startswith(whole) else ""
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
