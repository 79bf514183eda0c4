"""InternLM 3: Llama under a name of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.models.families import llama
from moefy.models.families.family import no_ffn_bias


def refuse(config: dict[str, Any]) -> str | None:
    """Biases in the FFN, by either name of their key."""
    return no_ffn_bias({"mlp_bias": config.get("mlp_bias") or config.get("bias")})


FAMILY = dataclasses.replace(llama.FAMILY, model_type="internlm3", refuse=refuse)
