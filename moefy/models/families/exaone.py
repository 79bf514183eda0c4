"""EXAONE 3: Llama, its tensors and sizes stored under other names."""

from __future__ import annotations

import dataclasses
import re

from moefy.models.families import llama

RENAMED = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.h\.": "model.layers.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"\.attn\.attention\.out_proj\.": ".self_attn.o_proj.",
    r"\.attn\.attention\.": ".self_attn.",
    r"\.ln_1\.": ".input_layernorm.",
    r"\.ln_2\.": ".post_attention_layernorm.",
    r"\.mlp\.c_fc_0\.": ".mlp.gate_proj.",
    r"\.mlp\.c_fc_1\.": ".mlp.up_proj.",
    r"\.mlp\.c_proj\.": ".mlp.down_proj.",
}


def named(name: str) -> str:
    """The name in Llama's class."""
    for stored, new in RENAMED.items():
        name = re.sub(stored, new, name)
    return name


FAMILY = dataclasses.replace(
    llama.FAMILY,
    keys={"num_hidden_layers": "num_layers"},
    activation="activation_function",
    named=named,
)
