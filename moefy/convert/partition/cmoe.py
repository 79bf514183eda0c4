"""CMoE's split: experts of neurons that are among the most active of the same tokens."""

from __future__ import annotations

from typing import Annotated

import torch

from moefy.convert.cluster import balanced_kmeans, gathered, marks, ranked
from moefy.types import FFN, Partition, Profile, Range, Shape

WHOLE = True  # it holds a mark of every neuron on every fitting token


def split(
    ffn: FFN,
    profile: Profile,
    shape: Shape,
    *,
    generator: torch.Generator,
    marked: Annotated[int, Range(1)] = 10,
    unit: bool = True,
    rounds: Annotated[int, Range(1)] = 1,
) -> Partition:
    """Share the neurons most often marked; balanced k-means of the others on their marks.

    The `marked` neurons of greatest |h| of a token are marked. A neuron is the binary column of its
    marks over the tokens; the first centres are the columns marked most often.

    Source: CMoE (arXiv 2502.04416), section 4.1, and its code, which scales rows and inputs to
    length one before it takes |h| (`unit`) and deals the neurons out only once (`rounds`). Nothing
    is drawn at random. We differ in the sizes, which are the given ones. Its own router is
    `cmoe`, which cannot be written.
    Cost: T * F floats for the marks, twice.
    """
    mark_TF = marks(ffn, profile, marked, unit=unit)
    shared_S, rest = ranked(mark_TF.mean(0), shape.num_shared)
    mark_RT = mark_TF[:, rest].T.contiguous()
    first_E, _ = ranked(mark_RT.mean(1), shape.num_experts)
    expert_R, _ = balanced_kmeans(mark_RT, mark_RT[first_E], rounds)
    return gathered(shared_S, rest, expert_R, shape.num_experts)
