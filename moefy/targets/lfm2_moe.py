"""LFM2-MoE: short convolutions, a sigmoid router with a selection bias, no shared expert.

The gate of a chosen expert is sigmoid(0) = 1/2 times `routed_scaling_factor`, which two makes one
whatever the number of experts per token: every expert is a bare slice of the dense FFN.
"""

from __future__ import annotations

from typing import Any

from moefy.layout import Shape
from moefy.shape import no_shared
from moefy.targets.target import (
    NUMBERED,
    Dense,
    Split,
    Target,
    Tensors,
    copied,
    expert_tensors,
    mismatch,
)


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


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one."""
    prefix = "feed_forward."
    return {
        prefix + "gate.weight": split.scaled_ED,
        prefix + "expert_bias": split.unbiased_E,
        **expert_tensors(split, 1.0, prefix + "experts.", NUMBERED),
    }


TARGET = Target(
    "lfm2_moe",
    configure,
    tensors,
    no_shared,
    elastic=True,
    selection_bias=True,
    engines=("transformers",),
    cannot=lambda dense: mismatch(dense, dense_layers="first"),
    ties=True,
)
