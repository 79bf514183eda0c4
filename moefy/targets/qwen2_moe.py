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
from moefy.targets.target import (
    ROUTER_SCALE,
    Target,
    copied,
    expert_tensors,
    rounded,
    sliding,
)

SHARED_GATE = 1e-6
"""Not zero: llama.cpp computes the sigmoid as silu(g) / g, which is not a number at zero."""


def configure(config: dict[str, Any], shape: Shape, dense_layers: list[int]) -> dict[str, Any]:
    """The configuration of a Qwen2-MoE model of this shape."""
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **copied(config),
        **sliding(config),
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers,
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
    shared_S = partition.shared_S
    hidden = ffn.gate_FD.shape[1]
    return {
        "mlp.gate.weight": (router_ED * ROUTER_SCALE).to(dtype),
        **expert_tensors(ffn, partition, rounded(1 / len(router_ED), dtype), dtype),
        "mlp.shared_expert.gate_proj.weight": ffn.gate_FD[shared_S].to(dtype),
        "mlp.shared_expert.up_proj.weight": ffn.up_FD[shared_S].to(dtype),
        "mlp.shared_expert.down_proj.weight": (ffn.down_DF[:, shared_S] * 2).to(dtype),
        "mlp.shared_expert_gate.weight": torch.full((1, hidden), SHARED_GATE, dtype=dtype),
    }


TARGET = Target(
    "qwen2_moe",
    configure,
    tensors,
    has_shared=True,
    elastic=True,
    engines=("transformers", "vLLM", "SGLang", "llama.cpp", "MLX"),
    attention_biases=True,
)
