"""Qwen2-MoE: a gated shared expert of any width, a softmax router over all experts.

With `norm_topk_prob` false (the only value llama.cpp and MLX know) the gate of a chosen expert is
its softmax probability, 1 / E for a small router: `down_proj` times E makes it one, whatever the
number of experts per token. The shared expert's gate is sigmoid(0) = 1/2: `down_proj` times two.
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
    expert_tensors,
    glu_tensors,
    mismatch,
    named,
    rounded,
    sliding,
)

SHARED_GATE = 1e-6
"""Not zero: llama.cpp computes the sigmoid as silu(g) / g, which is not a number at zero."""


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Qwen2-MoE model of this shape."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **copied(dense.config),
        **sliding(dense),
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense.left_dense),
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "shared_expert_intermediate_size": shape.num_shared,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(
    ffn: FFN, partition: Partition, router_ED: Tensor, experts_per_token: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The MoE block's tensors; every gate is one."""
    hidden = ffn.hidden_size
    return {
        "mlp.gate.weight": (router_ED * ROUTER_SCALE).to(dtype),
        **expert_tensors(ffn, partition, rounded(1 / len(router_ED), dtype), dtype),
        **named("mlp.shared_expert.", glu_tensors(ffn, partition.shared_S, 2.0, dtype)),
        "mlp.shared_expert_gate.weight": torch.full((1, hidden), SHARED_GATE, dtype=dtype),
    }


def cannot(dense: Dense) -> str | None:
    """A bias at the attention's output."""
    return mismatch(dense, biases="qkv", windows="any", dense_layers="any")


def balks(dense: Dense, shape: Shape) -> Reasons:
    """Scaled frequencies, windows, wide heads and dense layers, which only some engines know."""
    return engine_reasons(
        dense,
        rope="llama.cpp,MLX",
        window="llama.cpp,MLX",
        mixed="vLLM",
        wide_heads="vLLM,llama.cpp",
        dense_layers="llama.cpp,SGLang,MLX",
    )


TARGET = Target(
    "qwen2_moe",
    configure,
    tensors,
    any_shared,
    elastic=True,
    engines=("transformers", "vLLM", "SGLang", "llama.cpp", "MLX"),
    cannot=cannot,
    balks=balks,
    biases=lambda dense: "qkv",  # engines create them unconditionally
)
