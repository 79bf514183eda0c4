"""T5: an encoder and a decoder, of which the encoder's FFNs become experts."""

from __future__ import annotations

from typing import Any

from moefy.models.families.family import Config, Family
from moefy.types import ACTIVATIONS

FFN = "layer.1.DenseReluDense."


def refuse(config: Config) -> str | None:
    """An activation that is not known."""
    kind = str(config.get("feed_forward_proj", "relu"))
    if kind.removeprefix("gated-") not in ACTIVATIONS:
        known = f"{', '.join(ACTIVATIONS)}, each as it is or behind gated-"
        return f"feed_forward_proj is {kind}, expected one of {known}"
    return None


def variant(config: Config) -> dict[str, Any]:
    """Version 1.1 and Flan-T5 have a gate."""
    if not str(config.get("feed_forward_proj")).startswith("gated-"):
        return {}
    names = tuple(FFN + name for name in ("wi_0.weight", "wi_1.weight", "wo.weight"))
    return {
        "ffn": names,
        "gated": True,
    }


FAMILY = Family(
    refused={},
    missing_feature="T5's layers with several experts per token",
    refuse=refuse,
    tasks=("ForSeq2SeqLM",),
    layer="encoder.block.{layer}.",
    ffn=(FFN + "wi.weight", FFN + "wo.weight"),
    gated=False,
    keys={
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
    },
    width="d_ff",
    activation="dense_act_fn",
    block=FFN.rstrip("."),
    beside="the decoder",
    embedding="shared.weight",
    unread=r"EncDecAttention\.relative_attention_bias\.weight$",
    variant=variant,
)
