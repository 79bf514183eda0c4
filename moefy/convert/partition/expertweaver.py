"""ExpertWeaver's split: experts of neurons whose gates open on the same passages."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from moefy.convert.cluster import balanced_kmeans, gathered, ranked
from moefy.types import FFN, Partition, Profile, Range, Shape

WHOLE = True  # it holds the activations of every neuron on every fitting token


def split(
    ffn: FFN,
    profile: Profile,
    shape: Shape,
    *,
    generator: torch.Generator,
    passage: Annotated[int, Range(1)] = 64,
    rounds: Annotated[int, Range(1)] = 100,
) -> Partition:
    """Share the neurons of greatest mean |act(gate x)|; balanced k-means of the others' profiles.

    The profile of a neuron is its mean act(gate x) over each `passage` of so many tokens. The first
    centres are neurons drawn at random.

    Source: ExpertWeaver (arXiv 2602.15521), section 3 and appendix I; there is no code, and its
    "highest absolute average activation" is read as the mean of absolute values. Its samples are
    240 prompts of 48 tasks: our sequences are cut into passages, which makes about as many of the
    usual number of tokens. We differ in the number of shared neurons, which it sets by layer and we
    are given, and in that neurons are dealt out optimally, not greedily. Without a gate, the
    activations themselves are taken. Its own router is `expertweaver`.
    """
    mean_MF, size_F = _gates(ffn, profile.inputs()[0], max(1, passage))
    shared_S, rest = ranked(size_F, shape.num_shared)
    point_RM = mean_MF[:, rest].T.contiguous()
    first_E = torch.randperm(len(rest), generator=generator)[: shape.num_experts]
    expert_R, _ = balanced_kmeans(point_RM, point_RM[first_E.to(rest.device)], rounds)
    return gathered(shared_S, rest, expert_R, shape.num_experts)


def _gates(ffn: FFN, x_TD: Tensor, passage: int) -> tuple[Tensor, Tensor]:
    """Mean act(gate x) of every passage (M, F), and mean |act(gate x)| of all tokens (F)."""
    gate = ffn if ffn.gate_FD is None else FFN(None, ffn.gate_FD, ffn.down_DF, ffn.activation)
    means, size_F = [], 0.0
    for part_TD in x_TD.split(passage):
        open_TF = gate.activations(part_TD.to(ffn.up_FD))
        means.append(open_TF.mean(0))
        size_F = size_F + open_TF.abs().sum(0)
    return torch.stack(means), torch.as_tensor(size_F / len(x_TD))
