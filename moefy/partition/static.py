"""Static pruning, the control: keep the active neurons of greatest output energy, drop the rest."""

from __future__ import annotations

import torch

from moefy.layout import FFN, Partition, Profile, Shape


def split(ffn: FFN, profile: Profile, shape: Shape, *, generator: torch.Generator) -> Partition:
    """Keep as many neurons as `shape` has active, all shared; no neuron is routed.

    Source: neurons ranked by mean squared output, the uncentred form of FLAP (arXiv 2312.11983).
    """
    kept_S = profile.energy_F.topk(shape.num_active).indices.sort().values
    return Partition(kept_S, torch.empty((0, 0), dtype=torch.long, device=kept_S.device))
