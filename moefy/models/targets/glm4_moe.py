"""GLM-4-MoE: a sigmoid router, an ungated shared expert, no weight changed.

The gate of a chosen expert is sigmoid(0) = 1/2 times `routed_scaling_factor`, which two makes one
whatever the number of experts per token: every expert is a bare slice of the dense FFN.
"""

from __future__ import annotations

from typing import Any

from moefy.models.shape import shared_multiple
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a GLM-4-MoE model of this shape."""
    config = dense.common
    share = dense.rotary_share
    config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": share}
    return {
        **config,
        "head_dim": dense.head_dim,
        "partial_rotary_factor": share,
        "attention_bias": bool(dense.biases),
        "use_qk_norm": dense.config["model_type"] == "qwen3",
        "tie_word_embeddings": False,
        "first_k_dense_replace": len(dense.left_dense),
        "num_nextn_predict_layers": 0,
        "n_routed_experts": shape.num_experts,
        "n_shared_experts": shape.num_shared // shape.expert_width,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
        "output_router_logits": False,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one."""
    return {
        "mlp.gate.weight": split.scaled_ED,
        "mlp.gate.e_score_correction_bias": split.unbiased_E,
        **split.experts(1.0),
        **split.shared("mlp.shared_experts."),
    }


TARGET = Target(
    "Glm4MoeForCausalLM",
    configure,
    tensors,
    shared_multiple,
    elastic=True,
    selection_bias=True,
    attention_biases="qkv",
    partial_rotary=True,
    dense_layers="first",
    biases=lambda dense: "qkv" if dense.biases else "",
)
