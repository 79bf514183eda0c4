"""Granite-MoE with a shared expert: Granite's four multipliers, an ungated shared expert.

The router's softmax is over the chosen experts, 1 / K each for a small router: `down_proj` times
K makes the gates one, at that K only. Experts are stored stacked, gate and up fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.layout import FFN, Partition, Shape
from moefy.shape import any_shared
from moefy.targets.target import (
    ROUTER_SCALE,
    Dense,
    Reasons,
    Target,
    copied,
    engine_reasons,
    glu_tensors,
    mismatch,
    rounded,
)


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Granite-MoE-shared model of this shape.

    A model that is no Granite has its multipliers at one, but for the attention's, which is then
    1 / sqrt(head_dim).
    """
    config = dense.config
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return {
        "architectures": ["GraniteMoeSharedForCausalLM"],
        "model_type": "granitemoeshared",
        **copied(config),
        **{key: config.get(key, 1.0) for key in ones},
        "attention_multiplier": config.get("attention_multiplier", dense.head_dim**-0.5),
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.expert_width,
        "shared_intermediate_size": shape.num_shared,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(
    ffn: FFN, partition: Partition, router_ED: Tensor, experts_per_token: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    scale = 1 / rounded(1 / experts_per_token, dtype)
    experts = [glu_tensors(ffn, neurons, scale, dtype) for neurons in partition.experts_EN]
    gate, up, down = glu_tensors(ffn, partition.shared_S, 1.0, dtype)
    moe = "block_sparse_moe."
    return {
        moe + "router.layer.weight": (router_ED * ROUTER_SCALE).to(dtype),
        moe + "input_linear.weight": torch.stack([torch.cat(expert[:2]) for expert in experts]),
        moe + "output_linear.weight": torch.stack([expert[2] for expert in experts]),
        "shared_mlp.input_linear.weight": torch.cat([gate, up]),
        "shared_mlp.output_linear.weight": down,
    }


def balks(dense: Dense, shape: Shape) -> Reasons:
    """Scaled frequencies, which llama.cpp's converter refuses, and biases, which vLLM ignores."""
    return engine_reasons(dense, rope="llama.cpp", biases="vLLM")


TARGET = Target(
    "granitemoeshared",
    configure,
    tensors,
    any_shared,
    elastic=False,
    engines=("transformers", "vLLM", "llama.cpp"),
    cannot=lambda dense: mismatch(dense, biases="qkvo", wide_heads=False),
    balks=balks,
    biases=lambda dense: "qkvo" if dense.biases else "",
    ties=True,
)
