"""Qwen3-MoE: norms on query and key heads, a softmax router, no shared expert.

With `norm_topk_prob` true (the only value llama.cpp knows) the gates of the chosen experts sum to
one, 1 / K each for a small router: `down_proj` times K makes them one, at that K only.
"""

from __future__ import annotations

from typing import Any

from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Qwen3-MoE model of this shape."""
    return {
        **dense.common,
        **dense.sliding,
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense.left_dense),
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "moe_intermediate_size": shape.expert_width,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    return {
        "mlp.gate.weight": split.scaled_ED,
        **split.experts(split.gate(split.experts_per_token)),
    }


TARGET = Target(
    "Qwen3MoeForCausalLM",
    configure,
    tensors,
    attention_biases="qkvo",
    windows="all layers or none",
    dense_layers="any",
    biases=lambda dense: "qkvo" if dense.biases else "",
    copies=True,
)
