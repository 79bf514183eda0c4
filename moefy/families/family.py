"""What moefy needs to know of a dense family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def nothing_wrong(config: dict[str, Any]) -> str | None:
    """No reason to refuse."""


@dataclass(frozen=True)
class Family:
    """Where the FFN of a dense `model_type` stands, and which stock MoE classes can hold it."""

    model_type: str
    targets: tuple[str, ...]
    """MoE classes that hold this family exactly, best first."""
    refuse: Callable[[dict[str, Any]], str | None] = nothing_wrong
    """Why a checkpoint with this configuration cannot be converted; None if it can."""
    layer: str = "model.layers.{layer}."
    gate: str = "mlp.gate_proj.weight"
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"

    def ffn_names(self, layer: int) -> tuple[str, str, str]:
        """Tensor names of gate, up and down of a layer."""
        prefix = self.layer.format(layer=layer)
        return prefix + self.gate, prefix + self.up, prefix + self.down
