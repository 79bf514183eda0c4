"""Clusters of neurons and of tokens, which the published methods are made of."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moefy.convert.assign_on_device import assign
from moefy.convert.kmeans import kmeans
from moefy.convert.profile import CHUNK
from moefy.convert.routed_ffn import top_mask
from moefy.errors import MoefyError
from moefy.types import FFN, Partition, Profile


def ranked(
    score_F: Tensor, num_shared: int, before_F: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `num_shared` neurons of highest score, highest first, and the others in rising order.

    Those that `before_F` marks come before all others.
    """
    order_F = score_F.argsort(descending=True, stable=True)
    if before_F is not None:
        order_F = order_F[before_F[order_F].argsort(descending=True, stable=True)]
    return order_F[:num_shared], order_F[num_shared:].sort().values


def gathered(shared_S: Tensor, rest_R: Tensor, expert_R: Tensor, num_experts: int) -> Partition:
    """The partition that shares `shared_S` and puts each of `rest_R` (rising) in its expert."""
    experts_EN = rest_R[expert_R.argsort(stable=True)].view(num_experts, -1)
    return Partition(shared_S.sort().values, experts_EN)


def balanced_kmeans(point_RQ: Tensor, centre_EQ: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """The cluster of each point, all clusters of one size, and their means (E, Q).

    Each round deals the points out to the centres so that the summed squared distance is least,
    and moves the centres to the means; until nothing changes, or `rounds` are over. Where all
    clusters have one size, |p|^2 and |c|^2 add the same to every way of dealing: -2 p.c decides.
    The same holds for the city-block distance of marks (zero or one) from their means.
    """
    num_clusters = len(centre_EQ)
    cluster_R = torch.full(point_RQ.shape[:1], -1, device=point_RQ.device)
    for _ in range(max(1, rounds)):
        before_R = cluster_R
        cluster_R = assign(point_RQ @ centre_EQ.T, len(point_RQ) // num_clusters)
        if torch.equal(cluster_R, before_R):
            break
        order_R = cluster_R.argsort(stable=True)
        centre_EQ = point_RQ[order_R].view(num_clusters, -1, point_RQ.shape[1]).mean(1)
    return cluster_R, centre_EQ


def marks(ffn: FFN, profile: Profile, most: int, *, unit: bool) -> Tensor:
    """One where a neuron is among the `most` of greatest |activation| of a fitting token, (T, F).

    With `unit`, gate rows, up rows and inputs are first scaled to length one; a neuron without a
    gate is taken as it is. Source: CMoE (arXiv 2502.04416), section 4.1; `unit` is its code's.
    """
    if unit and ffn.gate_FD is not None:
        ffn = dataclasses.replace(ffn, gate_FD=normalize(ffn.gate_FD), up_FD=normalize(ffn.up_FD))
    else:
        unit = False
    mark_TF = torch.empty(profile.num_fit, ffn.num_neurons, device=profile.device)
    for first in range(0, profile.num_fit, CHUNK):
        tokens = slice(first, min(first + CHUNK, profile.num_fit))
        x_TD = profile.x_TD[tokens].to(profile.device)
        h_TF = ffn.activations(normalize(x_TD) if unit else x_TD)
        mark_TF[tokens] = top_mask(h_TF.abs_(), min(most, ffn.num_neurons))
    return profile.group.gather(mark_TF)


def token_centroids(profile: Profile, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Means of clusters of all processes' inputs to fit on (k-means), shape (E, D).

    They follow from the seed that `generator` was made with, whatever was drawn from it since: a
    partition and a router that ask for as many get the same, in the same order.

    Raises:
        MoefyError: code 2, where there are fewer tokens than clusters.
    """
    x_TD, _ = profile.inputs()
    if len(x_TD) < num_clusters:
        raise MoefyError(
            f"{len(x_TD)} tokens to fit on cannot make {num_clusters} clusters; "
            "raise --tokens or lower --experts",
            code=2,
        )
    seed = generator.initial_seed() % 2**32
    centre_ED, _ = kmeans(x_TD, num_clusters, seed, restarts=10, rounds=100, tolerance=1e-3)
    return centre_ED.to(profile.device)
