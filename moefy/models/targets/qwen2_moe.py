"""Qwen2-MoE: a gated shared expert of any width, a softmax router over all experts.

With `norm_topk_prob` false (the only value llama.cpp and MLX know) the gate of a chosen expert is
its softmax probability, 1 / E for a small router: `down_proj` times E makes it one, whatever the
number of experts per token. Copies have it true: their gates sum to one. The shared expert's gate
is sigmoid(0) = 1/2: `down_proj` times two.
"""

from __future__ import annotations

from typing import Any

from moefy.models.shape import any_shared
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape

SHARED_GATE = 1e-6
"""Not zero: llama.cpp computes the sigmoid as silu(g) / g, which is not a number at zero."""


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Qwen2-MoE model of this shape."""
    return {
        **dense.common,
        **dense.sliding,
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense.left_dense),
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "shared_expert_intermediate_size": shape.num_shared,
        "norm_topk_prob": shape.granularity > 0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one."""
    gate_1D = split.ffn.up_FD.new_full((1, split.ffn.hidden_size), SHARED_GATE, dtype=split.dtype)
    return {
        "mlp.gate.weight": split.scaled_ED,
        **split.experts(split.gate(split.num_experts)),
        **split.shared("mlp.shared_expert.", 2.0),
        "mlp.shared_expert_gate.weight": gate_1D,
    }


TARGET = Target(
    "Qwen2MoeForCausalLM",
    configure,
    tensors,
    any_shared,
    elastic=True,
    attention_biases="qkv",
    windows="any",
    dense_layers="any",
    biases=lambda dense: "qkv",  # engines create them unconditionally
    copies=True,
)
