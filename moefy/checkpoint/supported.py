"""Check that a model can be converted, by its configuration alone."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from moefy.checkpoint.tensor_names import other_task
from moefy.files.safetensors_header import ADAPTER, CONFIG, contradiction
from moefy.models import families
from moefy.types import ACTIVATIONS

Config = Mapping[str, Any]
SIZES = "hidden_size num_hidden_layers num_attention_heads vocab_size".split()
MOST_LABELS = 10**6
IMPLEMENTATION = "_implementation"
"""Part of the configuration keys that choose code, such as the attention's."""

KINDS = {
    "already a Mixture of Experts": "expert",
    "a state-space or recurrent model": "state_size|ssm_|mamba|rwkv|recurrent",
    "an encoder or an encoder-decoder": "is_encoder_decoder|type_vocab_size|MaskedLM|bert",
    "several models in one, of which text is a part": "(text|vision|audio)_config",
}
"""Kinds of unsupported models, by patterns of their keys, type and architectures."""


def unsupported(path: Path, config: Config) -> str | None:
    """Why a configuration, complete or not, cannot be converted; None if it can."""
    return not_plain(path, config) or _not_convertible(path, config)


def not_plain(path: Path, config: Config) -> str | None:
    """Why transformers would open a model not only from its configuration and tensors."""
    if config.get("auto_map"):
        # transformers may have a class of that name, for the code may be a copy of it.
        model_type = config.get("model_type")
        plain = f"; if it is a plain {model_type}, remove auto_map from {CONFIG}"
        advice = plain if model_type in families.names() else ""
        return f"it brings code of its own (auto_map), which is never run{advice}"
    # transformers would fetch and run a kernel from the hub under a name with a slash.
    if any("/" in str(config[key]) for key in config if IMPLEMENTATION in key):
        return "it needs a kernel of its own (attn_implementation), which is never run"
    # transformers would open these instead of the weights that are converted.
    if config.get("transformers_weights"):
        return "it names weights of its own (transformers_weights); rename them model.safetensors"
    if os.path.lexists(path.with_name(ADAPTER)):
        return f"an adapter lies beside it ({ADAPTER}); merge it first (merge_and_unload)"
    return None


def _not_convertible(path: Path, config: Config) -> str | None:
    if config.get("quantization_config") or config.get("quantization"):
        return "it is quantised (quantization_config); dequantise it first"
    model_type, known = config.get("model_type"), families.names()
    if not isinstance(model_type, str):
        expected = "expected one that `moefy families` lists"
        raise contradiction(f"{path} has no model_type, {expected}")
    if model_type not in known:
        marks = f"{model_type} {config.get('architectures')} {[k for k, v in config.items() if v]}"
        kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, marks)]
        near = [] if kinds else difflib.get_close_matches(model_type, known, n=1)
        problem = f"model_type {short(model_type)} is {[*kinds, 'unknown'][0]}"
        guess = f"; the nearest is {near[0]}" if near else ""
        return f"{problem}; `moefy families` lists the {len(known)} that are supported{guess}"
    family = families.load(model_type, config)
    if reason := other_task(config, family.tasks):
        return reason
    if str(activation := config.get(family.activation, "silu")) not in ACTIVATIONS:
        return (
            f"{family.activation} is {short(activation)}, expected one of {', '.join(ACTIVATIONS)}"
        )
    both = "ForSeq2SeqLM" in family.tasks
    if bool(config.get("is_encoder_decoder", both)) != both:
        return f"is_encoder_decoder is {not both}, which no {model_type} is"
    return family.why_refused(config)


def wrong_size(config: Config) -> str | None:
    """Which size in a configuration is impossible for any model; None if none is."""
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
        return f"the number of FFN neurons ({family.width}) cannot be computed: {error!r}"
    if neurons < 1:
        return f"the number of FFN neurons ({family.width}) is {short(neurons)}"
    labels = config.get("num_labels")  # transformers builds a table of them
    if labels is not None and not (type(labels) is int and 0 <= labels <= MOST_LABELS):
        return f"num_labels is {short(labels)}, expected a whole number up to {MOST_LABELS}"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads > hidden or heads % groups:
        most = f"at most {short(hidden)} and a multiple of num_key_value_heads, {short(groups)}"
        return f"num_attention_heads is {short(heads)}, expected {most}"
    return None
