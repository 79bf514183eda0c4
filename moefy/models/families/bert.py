"""BERT: an encoder that norms what leaves each sublayer, its FFN without a gate."""

from __future__ import annotations

import re
from typing import Any

from moefy.models.families.family import Family, read_plain, shapes_plain, write_plain


def refuse(config: dict[str, Any]) -> str | None:
    """A decoder made of an encoder's parts."""
    if config.get("is_decoder") or config.get("add_cross_attention"):
        return "it is a decoder (is_decoder), expected an encoder"
    return None


def named(name: str) -> str:
    """A model without a head lacks the model's name; the first checkpoints had other norms."""
    name = re.sub(r"^(?=(embeddings|encoder|pooler)\.)", "bert.", name)
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}[match[1]],
        name,
    )


FAMILY = Family(
    "bert",
    missing_feature="an encoder's layers, which attend to both sides",
    refuse=refuse,
    tasks=("ForMaskedLM", "ForSequenceClassification", "Model"),
    layer="bert.encoder.layer.{layer}.",
    ffn=("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"),
    read=read_plain,
    write=write_plain,
    shapes=shapes_plain,
    down_bias="output.dense.bias",
    gated=False,
    block="output.dense",
    emptied=("intermediate",),
    behind="output.LayerNorm",
    embedding="bert.embeddings.word_embeddings.weight",
    positions="bert.embeddings.position_embeddings.weight",
    embeddings="bert.embeddings",
    head="cls.predictions.decoder.weight",
    named=named,
    unread=r"\.position_ids$|\.pooler\.|\.seq_relationship\.",
)
