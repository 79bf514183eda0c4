"""Random equal experts, the control for clustering: shared by energy, the others by lot."""

from __future__ import annotations

import torch

from moefy.types import FFN, Partition, Profile, Shape


def split(ffn: FFN, profile: Profile, shape: Shape, *, generator: torch.Generator) -> Partition:
    """Share the neurons of greatest mean output energy and deal out the others at random.

    Source: the random split of LLaMA-MoE (arXiv 2406.16554), with shared neurons.
    """
    order_F = profile.energy_F.argsort(descending=True, stable=True)
    shared_S, rest = order_F[: shape.num_shared], order_F[shape.num_shared :]
    dealt = rest[torch.randperm(len(rest), generator=generator).to(rest.device)]
    experts_EN = dealt.view(shape.num_experts, shape.expert_width).sort(1).values
    return Partition(shared_S.sort().values, experts_EN)
