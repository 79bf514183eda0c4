"""Upcycling: the experts are copies of the whole FFN, or of slices of it."""

from __future__ import annotations

import torch

from moefy.types import FFN, Partition, Profile, Shape

COPIES = True  # neurons stand in many experts, whose gates sum to one
ROUTERS = ("clusters", "random")  # others compare what experts do, and copies do the same


def split(ffn: FFN, profile: Profile, shape: Shape, *, generator: torch.Generator) -> Partition:
    """Share the neurons of greatest mean output energy, if a class must share some, cut the others
    into slices as they stand, and repeat these slices until there are as many as experts.

    Source: sparse upcycling (arXiv 2212.05055), which copies whole FFNs, and the virtual groups of
    arXiv 2410.07524, whose slices stand copy by copy as here.
    """
    order_F = profile.energy_F.argsort(descending=True, stable=True)
    shared_S = order_F[: shape.num_shared].sort().values
    slices_GN = order_F[shape.num_shared :].sort().values.view(-1, shape.expert_width)
    return Partition(shared_S, slices_GN.repeat(shape.num_experts // len(slices_GN), 1))
