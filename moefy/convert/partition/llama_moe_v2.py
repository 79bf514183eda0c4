"""LLaMA-MoE v2's split: experts of neurons that matter to the loss on the same kind of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.convert.cluster import token_centroids
from moefy.convert.profile import CHUNK, activations
from moefy.convert.routed_ffn import top_mask
from moefy.types import FFN, Partition, Profile, Shape

GRADIENT = True  # it needs `Profile.gradient_TD`


def split(ffn: FFN, profile: Profile, shape: Shape, *, generator: torch.Generator) -> Partition:
    """Give every expert the neurons of greatest importance on the tokens of its own cluster.

    The importance of a neuron on a token is |h * dL/dh|, L the dense model's loss. The inputs are
    clustered by k-means, one cluster for each expert; a token is of the cluster whose centroid has
    the greatest product with its input, and importance is averaged over them. Shared neurons are
    those that most experts want among their first; the others go to experts in falling order of
    importance, to the first that wants them and has room.

    Source: LLaMA-MoE v2 (arXiv 2411.15708) and its code (residual split, no neuron twice). We
    differ in the sizes, which are the given ones; in one cluster for each routed expert, where its
    code makes clusters for the shared ones as well and leaves them unused; and in taking inputs and
    h from the model as converted so far, like every partition here, and only the gradients from the
    dense one. Its own router is `llama-moe-v2`.
    Cost: the gradients, for which see `gradients.ffn_gradients`; beyond them T * F * D operations.
    """
    score_EF = importance(ffn, profile, token_centroids(profile, shape.num_experts, generator))
    shared_S = _shared(score_EF, shape)
    left = set(range(ffn.num_neurons)).difference(shared_S.tolist())
    experts: list[list[int]] = [[] for _ in range(shape.num_experts)]
    for place in score_EF.flatten().argsort(descending=True, stable=True).tolist():
        expert, neuron = divmod(place, ffn.num_neurons)
        if neuron in left and len(experts[expert]) < shape.expert_width:
            experts[expert].append(neuron)
            left.remove(neuron)
    experts_EN = torch.tensor(experts, device=score_EF.device)
    return Partition(shared_S.sort().values, experts_EN.sort(1).values)


def importance(ffn: FFN, profile: Profile, centre_ED: Tensor) -> Tensor:
    """Mean |h * dL/dh| of every neuron over each cluster's fitting tokens, shape (E, F)."""
    assert profile.gradient_TD is not None, "whoever profiles must ask for gradients"
    score_EF = torch.zeros(len(centre_ED), ffn.num_neurons, device=centre_ED.device)
    count_E = torch.zeros(len(centre_ED), device=centre_ED.device)
    for first in range(0, profile.num_fit, CHUNK):
        tokens = slice(first, min(first + CHUNK, profile.num_fit))
        # Of y = down h, so dL/dh = down' dL/dy.
        slope_TF = profile.gradient_TD[tokens].to(centre_ED) @ ffn.down_DF
        h_TF = activations(ffn, profile, tokens) / profile.scale_T[tokens, None]
        cluster_TE = top_mask(profile.x_TD[tokens].to(centre_ED) @ centre_ED.T, 1)
        score_EF += cluster_TE.T @ slope_TF.mul_(h_TF).abs_()
        count_E += cluster_TE.sum(0)
    return score_EF / count_E.clamp_min(1)[:, None]


def _shared(score_EF: Tensor, shape: Shape) -> Tensor:
    """The neurons that stand among the first `expert_width` of most experts.

    Those that most experts want are taken, then those that most want among the first of what is
    left, and so on; by index where too many are wanted by as many.
    """
    left_EF = score_EF.clone()
    shared: list[int] = []
    while len(shared) < shape.num_shared:
        first_EN = left_EF.argsort(dim=1, descending=True, stable=True)[:, : shape.expert_width]
        wanted_F = torch.bincount(first_EN.flatten(), minlength=score_EF.shape[1])
        taken = (wanted_F == wanted_F.max()).nonzero().flatten()
        taken = taken[: shape.num_shared - len(shared)]
        left_EF[:, taken] = -torch.inf
        shared += taken.tolist()
    return torch.tensor(shared, dtype=torch.long, device=score_EF.device)
