"""FlexOlmo: OLMo 2's norms, a softmax router over all experts, no shared expert.

With `norm_topk_prob` false the gate of a chosen expert is 1 / E for a small router: `down_proj`
times E makes it one, whatever the number of experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.layout import FFN, Partition, Shape
from moefy.shape import no_shared
from moefy.targets.target import (
    ROUTER_SCALE,
    Dense,
    Target,
    copied,
    engine_reasons,
    expert_tensors,
    mismatch,
    rounded,
)


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a FlexOlmo model of this shape."""
    return {
        "architectures": ["FlexOlmoForCausalLM"],
        "model_type": "flex_olmo",
        **copied(dense.config),
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": False,
        "intermediate_size": shape.expert_width,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(
    ffn: FFN, partition: Partition, router_ED: Tensor, experts_per_token: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The MoE block's tensors; every gate is one."""
    return {
        "mlp.gate.weight": (router_ED * ROUTER_SCALE).to(dtype),
        **expert_tensors(ffn, partition, rounded(1 / len(router_ED), dtype), dtype),
    }


TARGET = Target(
    "flex_olmo",
    configure,
    tensors,
    no_shared,
    elastic=True,
    engines=("transformers", "vLLM"),
    cannot=lambda dense: mismatch(dense, biases="qkvo", wide_heads=False),
    balks=lambda dense, shape: engine_reasons(dense),
)
