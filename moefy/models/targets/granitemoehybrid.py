"""Granite-MoE-hybrid with attention in every layer: Granite-MoE-shared under another name."""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.models.targets import granitemoeshared
from moefy.models.targets.target import Dense
from moefy.types import Shape


def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
    """The configuration of a Granite-MoE-hybrid model of this shape, with no Mamba layer."""
    hidden = dense.config["hidden_size"]
    return {
        **granitemoeshared.configure(dense, shape),
        "position_embedding_type": dense.config.get("position_embedding_type", "rope"),
        "layer_types": ["attention"] * dense.num_layers,
        # No layer uses these, but loaders ask for them and check that they fit together.
        "mamba_expand": 2,
        "mamba_n_heads": 2,
        "mamba_d_head": hidden,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 256,
    }


TARGET = dataclasses.replace(
    granitemoeshared.TARGET, architecture="GraniteMoeHybridForCausalLM", configure=configure
)
