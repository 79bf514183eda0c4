"""Gemma 1: embeddings times sqrt(D), norms stored less one, GELU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moefy.models.families.family import Config, Family

if TYPE_CHECKING:
    from torch import Tensor


def rest(config: Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Embeddings and norms as they are used. In bfloat16 this rounds them once more."""
    if name == FAMILY.embedding:
        return {name: tensor.float() * config["hidden_size"] ** 0.5}
    if name.endswith("norm.weight"):
        return {name: tensor.float() + 1.0}
    return {name: tensor}


FAMILY = Family(
    targets=("glm4_moe",),
    embedding_scale=lambda config: config["hidden_size"] ** 0.5,
    rest=rest,
)
