"""GPT-2: an FFN without a gate, its matrices stored transposed, and learned positions."""

from __future__ import annotations

import re

from moefy.models.families.family import Config, Family


def named(name: str) -> str:
    """The first checkpoints lack the model's name before each tensor's."""
    return re.sub(r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer.", name)


def neurons(config: Config) -> int:
    """Four times the width of the model, if it does not say."""
    return int(config.get("n_inner") or 4 * config["n_embd"])


FAMILY = Family(
    missing_feature="an FFN with biases and without a gate",
    refused={
        "scale_attn_by_inverse_layer_idx": "it scales its attention by layer",
        "add_cross_attention": "it attends to another model's states",
    },
    layer="transformer.h.{layer}.",
    ffn=("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"),
    transposed=True,
    down_bias="mlp.c_proj.bias",
    gated=False,
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    },
    width="n_inner",
    neurons=neurons,
    activation="activation_function",
    named=named,
    unread=r"\.attn\.(masked_)?bias$",
    embedding="transformer.wte.weight",
    positions="transformer.wpe.weight",
)
