"""k-means where the points lie: scikit-learn's on a CPU, the same in torch on a GPU."""

from __future__ import annotations

import math

import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import Tensor
from torch.nn.functional import one_hot


def kmeans(
    point_RQ: Tensor,
    num_clusters: int,
    seed: int,
    *,
    restarts: int = 1,
    rounds: int = 300,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Centres (E, Q) and the cluster of each point (R,), from the tightest of `restarts` runs.

    A run ends after `rounds`, or where the centres' summed squared steps are at most `tolerance`
    times the mean variance. Without restarts it is scikit-learn's `n_init="auto"`.
    """
    if point_RQ.is_cuda:
        return kmeans_on_device(point_RQ, num_clusters, seed, restarts, rounds, tolerance)
    means = KMeans(
        num_clusters,
        n_init=restarts,  # pyright: ignore[reportArgumentType]
        max_iter=rounds,
        tol=tolerance,
        random_state=seed,
    ).fit(point_RQ.numpy())
    return torch.as_tensor(means.cluster_centers_), torch.as_tensor(means.labels_).long()


def kmeans_on_device(
    point_RQ: Tensor, num_clusters: int, seed: int, restarts: int, rounds: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """`kmeans` in torch. An empty cluster keeps its centre."""
    mean_Q = point_RQ.mean(0)
    point_RQ = point_RQ - mean_Q  # distances lose less to rounding
    least_step = tolerance * float(point_RQ.var(0, correction=0).mean())
    best_EQ, tightest = point_RQ[:num_clusters], math.inf
    for restart in range(restarts):
        centre_EQ = point_RQ[spread_on_device(point_RQ, num_clusters, seed + restart)]
        for _ in range(rounds):
            member_RE = one_hot(_nearest(point_RQ, centre_EQ), num_clusters).to(point_RQ)
            count_E1 = member_RE.sum(0)[:, None]
            mean_EQ = member_RE.T @ point_RQ / count_E1.clamp_min(1)
            step_EQ = torch.where(count_E1 > 0, mean_EQ - centre_EQ, 0.0)
            centre_EQ = centre_EQ + step_EQ
            if float(step_EQ.square().sum()) <= least_step:
                break
        inertia = float((point_RQ - centre_EQ[_nearest(point_RQ, centre_EQ)]).square().sum())
        if inertia < tightest:
            best_EQ, tightest = centre_EQ, inertia
    return best_EQ + mean_Q, _nearest(point_RQ, best_EQ)


def spread(point_RQ: Tensor, num_centres: int, seed: int) -> Tensor:
    """The points (E,) that k-means++ draws as the first centres."""
    if point_RQ.is_cuda:
        return spread_on_device(point_RQ, num_centres, seed)
    return torch.as_tensor(kmeans_plusplus(point_RQ.numpy(), num_centres, random_state=seed)[1])


def spread_on_device(point_RQ: Tensor, num_centres: int, seed: int) -> Tensor:
    """`spread` in torch: of a few points drawn by their squared distance to the nearest centre, the
    one becomes a centre that leaves the least sum of these.

    Source: k-means++ (Arthur, Vassilvitskii, 2007), greedy as in scikit-learn.
    """
    generator = torch.Generator(point_RQ.device).manual_seed(seed)
    like = {"generator": generator, "device": point_RQ.device}
    chosen = [torch.randint(len(point_RQ), (1,), **like)]
    away_1R = torch.cdist(point_RQ[chosen[0]], point_RQ).square_()
    race_NR = away_1R.new_empty(2 + int(math.log(num_centres)), len(point_RQ))
    for _ in range(1, num_centres):
        # The largest of rates over exponential draws is a draw by these rates.
        race_NR.exponential_(generator=generator)
        drawn_N = (away_1R / race_NR).argmax(1)
        away_NR = torch.cdist(point_RQ[drawn_N], point_RQ).square_().minimum(away_1R)
        best = away_NR.sum(1).argmin(0, keepdim=True)
        away_1R = away_NR[best]
        chosen.append(drawn_N[best])
    return torch.cat(chosen)


def _nearest(point_RQ: Tensor, centre_EQ: Tensor) -> Tensor:
    """The nearest centre of each point."""
    return (0.5 * centre_EQ.square().sum(1) - point_RQ @ centre_EQ.T).argmin(1)
