"""Granite-MoE with a shared expert: Granite's four multipliers, an ungated shared expert.

The router's softmax is over the chosen experts, 1 / K each for a small router: `down_proj` times
K makes the gates one, at that K only. Experts are stored stacked, gate and up fused.
"""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import fuse
from moefy.models.shape import any_shared
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Granite-MoE-shared model of this shape.

    A model that is no Granite has its multipliers at one, but for the attention's, which is then
    1 / sqrt(head_dim).
    """
    config = dense.config
    ones = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    return {
        **dense.common,
        **{key: config.get(key, 1.0) for key in ones},
        "attention_multiplier": config.get("attention_multiplier", dense.head_dim**-0.5),
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.expert_width,
        "shared_intermediate_size": shape.num_shared,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    import torch

    scale = 1 / split.gate(split.experts_per_token)
    experts = [split.part(neurons, scale) for neurons in split.partition.experts_EN]
    shared = split.part(split.partition.shared_S)
    block = "block_sparse_moe."
    return {
        block + "router.layer.weight": split.scaled_ED,
        block + "input_linear.weight": torch.stack([fuse(part) for part in experts]),
        block + "output_linear.weight": torch.stack([part.down_DF for part in experts]),
        "shared_mlp.input_linear.weight": fuse(shared),
        "shared_mlp.output_linear.weight": shared.down_DF,
    }


TARGET = Target(
    "GraniteMoeSharedForCausalLM",
    configure,
    tensors,
    any_shared,
    attention_biases="qkvo",
    wide_heads=False,
    biases=lambda dense: "qkvo" if dense.biases else "",
    copies=True,
    ties=True,
)
