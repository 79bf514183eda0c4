"""The transformers configuration of a dense checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import moefy.modeling  # noqa: F401 - makes the class of `--target moefy` known to transformers
from moefy.checkpoint.tensors import Checkpoint


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers configuration of a checkpoint, with its defaults filled in."""
    config: dict[str, Any] = {key: _number(value) for key, value in checkpoint.config.items()}
    for key in ("output_hidden_states", "output_attentions", "return_dict"):
        config.pop(key, None)  # these add outputs to a model
    return AutoConfig.for_model(config.pop("model_type"), **config)


def _number(value: Any) -> Any:
    """`value` with infinity and NaN, as transformers writes them, read as numbers."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_number(item) for item in value] if isinstance(value, list) else value
