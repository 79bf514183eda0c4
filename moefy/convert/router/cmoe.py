"""CMoE's router: an expert scores what its most typical neuron answers. It cannot be written."""

from __future__ import annotations

from typing import Annotated

import torch

from moefy.convert.cluster import marks
from moefy.types import FFN, Partition, Profile, Range, Router, Shape

WRITABLE = False  # no stock class looks at activations before it chooses


def fit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    *,
    generator: torch.Generator,
    marked: Annotated[int, Range(1)] = 10,
    unit: bool = True,
) -> Router:
    """Choose by |h| of one neuron per expert, whose marks are nearest to the expert's mean marks.

    `marked` and `unit` are those of the partition `cmoe`, whose experts it is made for.

    Source: CMoE (arXiv 2502.04416), equations 7 and 8; the absolute value is its code's. Its code
    also scales the two rows of the neuron to length one, and the paper does not. On SmolLM2-135M
    both are as good as chance.
    """
    mark_TF = marks(ffn, profile, marked, unit=unit)
    norm_EN = torch.zeros(partition.experts_EN.shape, device=mark_TF.device)
    for expert, neurons in enumerate(partition.experts_EN):
        mark_TN = mark_TF[:, neurons]
        away_N = (mark_TN - mark_TN.mean(1, keepdim=True)).square_().sum(0)
        norm_EN[expert, away_N.argmin()] = 1.0
    weight_ED = torch.zeros(shape.num_experts, profile.x_TD.shape[1], device=mark_TF.device)
    return Router(weight_ED, norm_EN)
