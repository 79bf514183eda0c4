"""A random linear router, the control for routing."""

from __future__ import annotations

import torch

from moefy.convert.routed_ffn import level
from moefy.types import FFN, Partition, Profile, Router, Shape


def fit(
    ffn: FFN, profile: Profile, partition: Partition, shape: Shape, *, generator: torch.Generator
) -> Router:
    """Draw Gaussian router rows and scale them to unit score variance."""
    size = (shape.num_experts, profile.x_TD.shape[1])
    weight_ED = torch.randn(size, generator=generator).to(profile.device)
    return Router(level(weight_ED, profile.group.gather(profile.x_TD)))
