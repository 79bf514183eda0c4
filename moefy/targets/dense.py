"""The dense class itself with a narrower FFN: how the static control is written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.layout import FFN, Partition, Shape
from moefy.targets.target import Target


def configure(config: dict[str, Any], shape: Shape, dense_layers: list[int]) -> dict[str, Any]:
    """The dense configuration with `intermediate_size` set to the neurons that are kept."""
    return {**config, "intermediate_size": shape.num_active}


def tensors(
    ffn: FFN, partition: Partition, router_ED: Tensor, experts_per_token: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The kept rows of gate and up, and columns of down."""
    kept_S = partition.shared_S
    return {
        "mlp.gate_proj.weight": ffn.gate_FD[kept_S].to(dtype),
        "mlp.up_proj.weight": ffn.up_FD[kept_S].to(dtype),
        "mlp.down_proj.weight": ffn.down_DF[:, kept_S].to(dtype),
    }


TARGET = Target(
    "dense", configure, tensors, has_shared=True, elastic=False, engines=("every engine",)
)
