"""The router that knows every expert's output before choosing: a ceiling, never written."""

from __future__ import annotations

import torch

from moefy.types import FFN, Partition, Profile, Router, Shape

WRITABLE = False  # no stock class looks at activations before it chooses


def fit(
    ffn: FFN, profile: Profile, partition: Partition, shape: Shape, *, generator: torch.Generator
) -> Router:
    """Choose by the experts' true output energy; the rows are zero."""
    weight_ED = torch.zeros(shape.num_experts, profile.x_TD.shape[1], device=profile.device)
    return Router(weight_ED, ffn.down_norm_sq_F[partition.experts_EN])
