"""Low-rank adapters on the experts, through PEFT; merged into the weights at the end."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from moefy.errors import MoefyError
from moefy.finetune.optim import parts


def adapted(model: Any, rank: int) -> Any:
    """The model with adapters on all its FFNs.

    Adapters target stacked experts as parameters, and other layers as modules.

    Raises:
        MoefyError: code 5, where PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MoefyError("--train lora needs PEFT: pip install 'moefy[finetune]'", code=5)
    from peft import LoraConfig, get_peft_model

    linear, stacked = [], []
    for name, parameter in parts(model)["experts"].items():
        home = model.get_submodule(name.rpartition(".")[0])
        if isinstance(home, nn.Linear) and parameter.ndim == 2:
            linear.append(name.removesuffix(".weight"))
        elif parameter.ndim == 3:  # not a bias
            stacked.append(name)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted(set(linear)),
        target_parameters=stacked,
        task_type="CAUSAL_LM",
    )
    # In the weights' own dtype: the optimizer keeps the copies in float32.
    return get_peft_model(model, config, autocast_adapter_dtype=False)
