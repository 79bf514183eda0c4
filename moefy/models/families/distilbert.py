"""DistilBERT: BERT's layers under other names, its FFN in a module of its own."""

import re

from moefy.models.families.family import Family

FAMILY = Family(
    refused={},
    missing_feature="an encoder's layers, which attend to both sides",
    tasks=("ForMaskedLM", "ForSequenceClassification", "Model"),
    layer="distilbert.transformer.layer.{layer}.",
    ffn=("ffn.lin1.weight", "ffn.lin1.bias", "ffn.lin2.weight"),
    down_bias="ffn.lin2.bias",
    gated=False,
    keys={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
    },
    width="hidden_dim",
    activation="activation",
    block="ffn",
    behind="output_layer_norm",
    embedding="distilbert.embeddings.word_embeddings.weight",
    positions="distilbert.embeddings.position_embeddings.weight",
    embeddings="distilbert.embeddings",
    head="vocab_projector.weight",
    named=lambda name: re.sub(r"^(?=(embeddings|transformer)\.)", "distilbert.", name),
    unread=r"\.position_ids$",
)
