"""Mixtral: a softmax router over the chosen experts, no shared expert; the widest known class.

The gates of the chosen experts sum to one, 1 / K each for a small router: `down_proj` times K
makes them one, at that K only. The only class whose scaled rotary frequencies llama.cpp honours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefy.layout import FFN, Partition, Shape
from moefy.shape import no_shared
from moefy.targets.target import (
    ROUTER_SCALE,
    Dense,
    Reasons,
    Target,
    copied,
    engine_reasons,
    expert_tensors,
    mismatch,
    rounded,
)

NAMES = ("w1.weight", "w3.weight", "w2.weight")
"""Gate, up and down of an expert."""


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Mixtral model of this shape."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **copied(dense.config),
        "head_dim": dense.head_dim,
        "sliding_window": dense.config["sliding_window"] if any(dense.windowed) else None,
        "tie_word_embeddings": dense.tied,
        "intermediate_size": shape.expert_width,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def tensors(
    ffn: FFN, partition: Partition, router_ED: Tensor, experts_per_token: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The MoE block's tensors; every gate is one at `experts_per_token`."""
    gate = rounded(1 / experts_per_token, dtype)
    prefix = "block_sparse_moe."
    return {
        prefix + "gate.weight": (router_ED * ROUTER_SCALE).to(dtype),
        **expert_tensors(ffn, partition, gate, dtype, prefix + "experts.", NAMES),
    }


def balks(dense: Dense, shape: Shape) -> Reasons:
    """Windows and wide heads, and in MLX scaled frequencies."""
    return engine_reasons(dense, rope="MLX", window="llama.cpp,MLX", wide_heads="MLX")


TARGET = Target(
    "mixtral",
    configure,
    tensors,
    no_shared,
    elastic=False,
    engines=("transformers", "vLLM", "SGLang", "llama.cpp", "MLX", "Ollama"),
    cannot=lambda dense: mismatch(dense, windows="all layers or none"),
    balks=balks,
    ties=True,
)
