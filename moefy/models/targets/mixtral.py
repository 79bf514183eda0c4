"""Mixtral: a softmax router over the chosen experts, no shared expert; the widest known class.

The gates of the chosen experts sum to one, 1 / K each for a small router: `down_proj` times K
makes them one, at that K only. The only class whose scaled rotary frequencies llama.cpp honours.
"""

from __future__ import annotations

from typing import Any

from moefy.models.targets.target import NUMBERED, Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Mixtral model of this shape."""
    return {
        **dense.common,
        "head_dim": dense.head_dim,
        "sliding_window": dense.config["sliding_window"] if any(dense.windowed) else None,
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.expert_width,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    gate = split.gate(split.experts_per_token)
    prefix = "block_sparse_moe."
    return {
        prefix + "gate.weight": split.scaled_ED,
        **split.experts(gate, prefix + "experts.", NUMBERED),
    }


TARGET = Target(
    "MixtralForCausalLM",
    configure,
    tensors,
    windows="all layers or none",
    copies=True,
    ties=True,
)
