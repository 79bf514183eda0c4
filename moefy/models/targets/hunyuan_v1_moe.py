"""Hunyuan-MoE: a softmax router, one ungated shared expert as wide as the routed ones.

The gates of the chosen experts sum to one, 1 / K each for a small router: `down_proj` times K
makes them one, at that K only.
"""

from __future__ import annotations

from typing import Any

from moefy.models.shape import one_shared
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Hunyuan-MoE model of this shape."""
    return {
        **dense.common,
        "head_dim": dense.head_dim,
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.expert_width,
        "num_experts": shape.num_experts,
        "moe_topk": shape.experts_per_token,
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "output_router_logits": False,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`. The router is computed in
    float32, so its gates are not rounded."""
    return {
        "mlp.gate.wg.weight": split.scaled_ED,
        **split.experts(1 / (split.granularity or split.experts_per_token)),
        **split.shared("mlp.shared_mlp."),
    }


TARGET = Target(
    "HunYuanMoEV1ForCausalLM",
    configure,
    tensors,
    one_shared,
    attention_biases="qkvo",
    biases=lambda dense: "qkvo" if dense.biases else "",
    copies=True,
    ties=True,
)
