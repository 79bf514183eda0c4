"""GPT-NeoX and Pythia: an FFN without a gate, beside the attention or behind it."""

from moefy.models.families.family import Family

FAMILY = Family(
    refused={},
    missing_feature="an FFN with biases and without a gate",
    layer="gpt_neox.layers.{layer}.",
    ffn=(
        "mlp.dense_h_to_4h.weight",
        "mlp.dense_h_to_4h.bias",
        "mlp.dense_4h_to_h.weight",
    ),
    down_bias="mlp.dense_4h_to_h.bias",
    gated=False,
    embedding="gpt_neox.embed_in.weight",
    named=lambda name: name.replace("embed_out.", "lm_head."),
    unread=r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$",
)
