"""FlexOlmo: OLMo 2's norms, a softmax router over all experts, no shared expert.

With `norm_topk_prob` false the gate of a chosen expert is 1 / E for a small router: `down_proj`
times E makes it one, whatever the number of experts per token. Copies have it true, so that their
gates sum to one.
"""

from __future__ import annotations

from typing import Any

from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a FlexOlmo model of this shape."""
    return {
        **dense.common,
        "attention_bias": bool(dense.biases),
        "tie_word_embeddings": False,
        "intermediate_size": shape.expert_width,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "norm_topk_prob": shape.granularity > 0,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(split: Split) -> Tensors:
    """The MoE block's tensors; every gate is one."""
    return {
        "mlp.gate.weight": split.scaled_ED,
        **split.experts(split.gate(split.num_experts)),
    }


TARGET = Target(
    "FlexOlmoForCausalLM",
    configure,
    tensors,
    elastic=True,
    attention_biases="qkvo",
    wide_heads=False,
    copies=True,
)
