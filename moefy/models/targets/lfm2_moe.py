"""LFM2-MoE: short convolutions, a sigmoid router with a selection bias, no shared expert.

With `norm_topk_prob` true (the only value llama.cpp knows) the gates of the chosen experts sum to
one, 1 / K each for a small router: `down_proj` times K makes them one, at that K only.
"""

from __future__ import annotations

from typing import Any

from moefy.models.targets.target import NUMBERED, Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of an LFM2-MoE model of this shape."""
    config = dense.config
    return {
        **dense.common,
        **{key: config[key] for key in ("norm_eps", "conv_bias", "conv_L_cache", "layer_types")},
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.num_neurons,
        "moe_intermediate_size": shape.expert_width,
        "num_dense_layers": len(dense.left_dense),
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
        "output_router_logits": False,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    prefix = "feed_forward."
    gate = split.rounded(1 / split.experts_per_token)
    return {
        prefix + "gate.weight": split.scaled_ED,
        prefix + "expert_bias": split.unbiased_E,
        **split.experts(gate, prefix + "experts.", NUMBERED),
    }


TARGET = Target(
    "Lfm2MoeForCausalLM", configure, tensors, selection_bias=True, dense_layers="first", ties=True
)
