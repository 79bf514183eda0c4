"""Cohere-2-MoE: attention and MoE side by side, a sigmoid router, ungated shared experts.

Without normalisation the gate of a chosen expert is sigmoid(0) = 1/2, whatever the number of
experts per token. Routed and shared experts are averaged, for llama.cpp knows no sum: `down_proj`
times four, and of the shared expert times two, makes every gate one.
"""

from __future__ import annotations

from typing import Any

from moefy.models.shape import shared_multiple
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Cohere-2-MoE model of this shape."""
    config = dense.config
    left = dense.left_dense
    return {
        **dense.common,
        **{key: config[key] for key in ("layer_norm_eps", "logit_scale", "layer_types")},
        "rms_norm_eps": None,
        "sliding_window": config["sliding_window"],
        "head_dim": dense.head_dim,
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.expert_width,
        "prefix_dense_intermediate_size": shape.num_neurons,
        # At 1 the class would rotate in all dense layers, whatever their attention.
        "prefix_dense_sliding_window_pattern": 2,
        "mlp_layer_types": ["dense" if n in left else "sparse" for n in range(dense.num_layers)],
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "num_shared_experts": shape.num_shared // shape.expert_width,
        "shared_expert_combination_strategy": "average",
        "expert_selection_fn": "sigmoid",
        "norm_topk_prob": False,
        "output_router_logits": False,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one."""
    return {
        "mlp.gate.weight": split.scaled_ED,
        **split.experts(0.25),
        **split.shared("mlp.shared_experts.", 2.0),
    }


TARGET = Target(
    "Cohere2MoeForCausalLM",
    configure,
    tensors,
    shared_multiple,
    elastic=True,
    attention_biases="qkvo",
    windows="any",
    dense_layers="any",
    biases=lambda dense: "qkvo" if dense.biases else "",
    ties=True,
)
