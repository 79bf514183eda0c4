"""GPT-2: an FFN without a gate, its matrices stored transposed, and learned positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moefy.models.families.family import Config, Family, Shapes, read_plain, write_plain

if TYPE_CHECKING:
    from torch import Tensor

    from moefy.types import FFN


def refuse(config: dict) -> str | None:
    """What makes layers depend on their number."""
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("add_cross_attention"):
        return "it scales its attention by layer or attends to another model's states"
    return None


def read(stored: Sequence[Tensor], activation: str) -> FFN:
    """Both matrices transposed."""
    up_DF, bias_F, down_FD = stored
    return read_plain((up_DF.T.contiguous(), bias_F, down_FD.T.contiguous()), activation)


def write(ffn: FFN) -> tuple[Tensor, ...]:
    """Both matrices transposed."""
    up_FD, bias_F, down_DF = write_plain(ffn)
    return up_FD.T, bias_F, down_DF.T


def named(name: str) -> str:
    """The first checkpoints lack the model's name before each tensor's."""
    return re.sub(r"^(?=wte\.|wpe\.|h\.|ln_f\.)", "transformer.", name)


def shapes(neurons: int, hidden: int) -> Shapes:
    """Of both matrices transposed, the bias between them."""
    return (hidden, neurons), (neurons,), (neurons, hidden)


def neurons(config: Config) -> int:
    """Four times the width of the model, if it does not say."""
    return int(config.get("n_inner") or 4 * config["n_embd"])


FAMILY = Family(
    "gpt2",
    missing_feature="an FFN with biases and without a gate",
    refuse=refuse,
    layer="transformer.h.{layer}.",
    ffn=("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight"),
    read=read,
    write=write,
    shapes=shapes,
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
