"""Qwen3.5-MoE, its text part: Qwen 3.5's layers, a gated shared expert, a softmax router.

The gates of the chosen experts sum to one, 1 / K each for a small router: `down_proj` times K
makes them one, at that K only. The shared expert's gate is sigmoid(0) = 1/2: `down_proj` times two.
"""

from __future__ import annotations

from typing import Any

from moefy.models.shape import any_shared
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape

LINEAR = "conv_kernel_dim key_head_dim value_head_dim num_key_heads num_value_heads".split()
"""Sizes of the layers that are no attention, less what all of their keys begin with."""


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Qwen3.5-MoE text model of this shape."""
    config = dense.config
    common = {key: value for key, value in dense.common.items() if key != "intermediate_size"}
    return {
        **common,
        **{f"linear_{key}": config[f"linear_{key}"] for key in LINEAR},
        "layer_types": config["layer_types"],
        "head_dim": dense.head_dim,
        "attention_bias": bool(config.get("attention_bias")),  # the first layer may have none
        "tie_word_embeddings": dense.tied,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "shared_expert_intermediate_size": shape.num_shared,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    gate_1D = split.ffn.up_FD.new_zeros((1, split.ffn.hidden_size), dtype=split.dtype)
    return {
        "mlp.gate.weight": split.scaled_ED,
        **split.experts(split.gate(split.experts_per_token)),
        **split.shared("mlp.shared_expert.", 2.0),
        "mlp.shared_expert_gate.weight": gate_1D,
    }


TARGET = Target(
    "Qwen3_5MoeForCausalLM",
    configure,
    tensors,
    any_shared,
    attention_biases="qkvo",
    copies=True,
    ties=True,
)
