"""MoEfication's split: experts of neurons with similar weights. It looks at no activation."""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn.functional import normalize

from moefy.convert.cluster import balanced_kmeans, gathered, ranked
from moefy.convert.kmeans import spread
from moefy.types import FFN, Partition, Profile, Range, Shape


def split(
    ffn: FFN,
    profile: Profile,
    shape: Shape,
    *,
    generator: torch.Generator,
    restarts: Annotated[int, Range(1, 1000)] = 10,
    rounds: Annotated[int, Range(1)] = 300,
) -> Partition:
    """Balanced k-means of the neurons' input weights, scaled to length one.

    Of `restarts` runs, each from its own centres (k-means++), the tightest is returned.

    Source: MoEfication (arXiv 2110.01786), "parameter clustering", and its code. It knows neither
    gates nor shared neurons: with a gate, the two rows of a neuron stand side by side, each of
    length one; shared are the neurons of greatest mean output energy. Its own router, a network of
    two layers, fits no stock class.
    """
    shared_S, rest = ranked(profile.energy_F, shape.num_shared)
    rows = [ffn.up_FD] if ffn.gate_FD is None else [ffn.gate_FD, ffn.up_FD]
    point_RQ = torch.cat([normalize(row_FD[rest]) for row_FD in rows], 1)
    runs = []
    for _ in range(restarts):
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        centre_EQ = point_RQ[spread(point_RQ, shape.num_experts, seed)]
        runs.append(balanced_kmeans(point_RQ, centre_EQ, rounds))
    # Clusters of one size are tightest where their means are longest.
    expert_R, _ = max(runs, key=lambda run: float(run[1].square().sum()))
    return gathered(shared_S, rest, expert_R, shape.num_experts)
