"""BERT: an encoder that norms what leaves each sublayer, its FFN without a gate."""

from __future__ import annotations

import re

from moefy.models.families.family import Family


def named(name: str) -> str:
    """A model without a head lacks the model's name; the first checkpoints had other norms."""
    name = re.sub(r"^(?=(embeddings|encoder|pooler)\.)", "bert.", name)
    return re.sub(
        r"LayerNorm\.(gamma|beta)$",
        lambda match: {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}[match[1]],
        name,
    )


FAMILY = Family(
    missing_feature="an encoder's layers, which attend to both sides",
    refused=dict.fromkeys(
        ("is_decoder", "add_cross_attention"), "it is a decoder, expected an encoder"
    ),
    tasks=("ForMaskedLM", "ForSequenceClassification", "Model"),
    layer="bert.encoder.layer.{layer}.",
    ffn=("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"),
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
