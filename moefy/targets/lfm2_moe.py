"""LFM2-MoE: short convolutions, a sigmoid router with a selection bias, no shared expert.

The gate of a chosen expert is sigmoid(0) = 1/2 times `routed_scaling_factor`, which two makes one
whatever the number of experts per token: every expert is a bare slice of the dense FFN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.layout import FFN, Partition, Shape
from moefy.shape import no_shared
from moefy.targets.target import ROUTER_SCALE, Dense, Target, copied, expert_tensors, mismatch

NAMES = ("w1.weight", "w3.weight", "w2.weight")
"""Gate, up and down of an expert."""


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of an LFM2-MoE model of this shape."""
    config = dense.config
    return {
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        **copied(config),
        **{key: config[key] for key in ("norm_eps", "conv_bias", "conv_L_cache", "layer_types")},
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.num_neurons,
        "moe_intermediate_size": shape.expert_width,
        "num_dense_layers": len(dense.left_dense),
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "use_expert_bias": True,
        "output_router_logits": False,
    }


def tensors(
    ffn: FFN, partition: Partition, router_ED: Tensor, experts_per_token: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The MoE block's tensors; every gate is one."""
    zeros = torch.zeros(len(router_ED), dtype=torch.float32, device=router_ED.device)
    prefix = "feed_forward."
    return {
        prefix + "gate.weight": (router_ED * ROUTER_SCALE).to(dtype),
        prefix + "expert_bias": zeros,
        **expert_tensors(ffn, partition, 1.0, dtype, prefix + "experts.", NAMES),
    }


TARGET = Target(
    "lfm2_moe",
    configure,
    tensors,
    no_shared,
    elastic=True,
    engines=("transformers",),
    cannot=lambda dense: mismatch(dense, dense_layers="first"),
    ties=True,
)
