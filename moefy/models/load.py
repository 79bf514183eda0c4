"""Models opened with transformers' own classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from moefy.errors import MoefyError


def auto_class(task: str) -> Any:
    """The Auto class of transformers that opens models for a task."""
    return getattr(transformers, "AutoModel" + task.removeprefix("Model"))


def plain_config(folder: Path, *, code: int = 3) -> PreTrainedConfig:
    """The configuration of a folder, without the choice of kernels and of additional outputs.

    These change no number, and kernels may need a package that is not installed.

    Raises:
        MoefyError: `code`, for values that its class does not take.
    """
    try:
        config: Any = AutoConfig.from_pretrained(
            folder,
            local_files_only=True,
            attn_implementation=None,
            experts_implementation=None,
            output_attentions=False,
        )
    except Exception as error:  # transformers raises anything for values of a wrong kind
        failure = f"transformers cannot open {folder / CONFIG_NAME}"
        raise library_error(failure, error, advice="correct it", code=code) from error
    config._attn_implementation = config._experts_implementation = None
    config.output_hidden_states, config.return_dict = False, True
    return config


def open_model(
    folder: Path,
    *,
    task: str = "ForCausalLM",
    config: PreTrainedConfig | None = None,
    code: int = 3,
    **more: Any,
) -> tuple[Any, dict[str, Any]]:
    """A model from local files, and transformers' lists of wrong tensor names by kind of fault.

    Raises:
        MoefyError: `code` if transformers cannot open it, 5 if a package is missing.
    """
    config = config or plain_config(folder, code=code)
    try:
        return auto_class(task).from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except MoefyError:
        raise
    except Exception as error:  # transformers raises anything for a damaged configuration
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            raise
        advice = f"expected a {CONFIG_NAME} that fits the weights"
        raise library_error(
            f"transformers cannot open {folder}", error, advice=advice, code=code
        ) from error


def model_of(
    folder: Path, config: PreTrainedConfig, state: dict[str, Tensor], *, task: str, dtype: Any
) -> Any:
    """A model of other tensors than its folder holds, which gives the generation defaults.

    Raises:
        MoefyError: code 3 where the class lacks tensors or has others.
    """
    with torch.device("meta"):
        kind: Any = type(auto_class(task).from_config(config))
    model, info = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    check_loaded(folder, info)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model that lacks tensors of its class (they would be random) or has others.

    Raises:
        MoefyError: code 3.
    """
    if wrong := {kind: sorted(map(str, keys))[:3] for kind, keys in info.items() if keys}:
        raise MoefyError(
            f"{folder} does not load cleanly: {wrong}; expected the tensors of the class that its "
            "configuration names"
        )


def library_error(failure: str, error: Exception, *, advice: str = "", code: int = 3) -> MoefyError:
    """An exception of a library as one line, with what to do."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, ImportError):
        return MoefyError(f"{failure}: {reason}; install it", code=5)
    return MoefyError(f"{failure}: {reason}{'; ' * bool(advice)}{advice}", code=code)


def runnable(model: Any) -> Any:
    """A loaded model, with its experts run one by one if transformers' default cannot run them.

    The default is `grouped_mm`, which takes rows of multiples of 16 bytes.
    """
    odd = (p.shape[-1] * p.element_size() % 16 for p in model.parameters() if p.ndim == 3)
    if model.config.model_type != "moefy" and any(odd):
        model.set_experts_implementation("eager")
    return model


def states_of(out: Any) -> Tensor:
    """The states in what a layer returns."""
    return out[0] if isinstance(out, tuple) else out


def some_layers(config: PreTrainedConfig, layers: Sequence[int]) -> PreTrainedConfig:
    """The configuration of a model of only some layers, in this order."""
    fewer: Any = copy.deepcopy(config)
    if config.model_type == "moefy":
        fewer.dense = some_layers(fewer.dense_config(), layers).to_dict()
        return fewer
    num_layers = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == num_layers and not key.endswith("_token_id"):
            setattr(fewer, key, [value[layer] for layer in layers])
    fewer.num_hidden_layers = len(layers)
    return fewer
