"""ERNIE-4.5-MoE: a float32 softmax router with a selection bias, ungated shared experts.

The gates of the chosen experts sum to one, 1 / K each for a small router: `down_proj` times K
makes them one, at that K only.
"""

from __future__ import annotations

from typing import Any

from moefy.models.shape import shared_multiple
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of an ERNIE-4.5-MoE model of this shape."""
    config = dense.config
    converted = [n for n in range(dense.num_layers) if n not in dense.left_dense]
    width = config["intermediate_size"]
    if not dense.left_dense:
        # Only dense layers have this width, and llama.cpp's converter takes the shared experts to
        # have it, divided by the number of key-value heads.
        width = shape.num_shared * (config.get("num_key_value_heads") or 1)
    return {
        **dense.common,
        "intermediate_size": width,
        "head_dim": dense.head_dim,
        "use_bias": False,
        "tie_word_embeddings": dense.tied,
        "moe_num_experts": shape.num_experts,
        "moe_k": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "moe_num_shared_experts": shape.num_shared // shape.expert_width,
        "moe_layer_start_index": converted[0],
        "moe_layer_end_index": converted[-1],
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    return {
        "mlp.gate.weight": split.scaled_ED,
        "mlp.moe_statics.e_score_correction_bias": split.unbiased_E[None],
        **split.experts(split.gate(split.experts_per_token)),
        **split.shared("mlp.shared_experts."),
    }


TARGET = Target(
    "Ernie4_5_MoeForCausalLM",
    configure,
    tensors,
    shared_multiple,
    selection_bias=True,
    dense_layers="first and last",
    copies=True,
    ties=True,
)
