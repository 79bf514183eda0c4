"""k-means in torch finds clusters as tight as scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from moefy.convert.kmeans import kmeans, kmeans_on_device, spread, spread_on_device


def sketches(seed: int, num_points: int = 1200) -> torch.Tensor:
    """Directions of unit-length profiles, some of them alike, as the split's sketches are."""
    dice = torch.Generator().manual_seed(seed)
    centre = torch.randn(40, 256, generator=dice)
    profile = centre[torch.randint(40, (num_points,), generator=dice)]
    profile = profile + 2 * torch.randn(num_points, 256, generator=dice)
    return profile / profile.norm(dim=1, keepdim=True) @ torch.randn(256, 32, generator=dice)


def inertia(point_RQ: torch.Tensor, centre_EQ: torch.Tensor) -> float:
    return float(torch.cdist(point_RQ, centre_EQ).min(1).values.square().sum())


@pytest.mark.parametrize("num_clusters", [8, 64])
def test_it_is_as_tight_as_scikit_learn(num_clusters):
    ratios = []
    for seed in range(5):
        point_RQ = sketches(seed)
        theirs = KMeans(num_clusters, n_init="auto", random_state=seed).fit(point_RQ.numpy())
        centre_EQ, cluster_R = kmeans_on_device(point_RQ, num_clusters, seed, 1, 300, 1e-4)
        assert torch.equal(cluster_R, torch.cdist(point_RQ, centre_EQ).argmin(1))
        ratios.append(inertia(point_RQ, centre_EQ) / theirs.inertia_)
        drawn = point_RQ[spread_on_device(point_RQ, num_clusters, seed)]
        assert inertia(point_RQ, drawn) > 1.1 * theirs.inertia_  # the start alone is not
    assert np.mean(ratios) < 1.01


def test_more_restarts_are_at_least_as_tight_and_the_seed_decides():
    point_RQ = sketches(0, 300)
    one, again, other, best = (
        kmeans_on_device(point_RQ, 16, seed, restarts, 100, 1e-4)[0]
        for seed, restarts in ((3, 1), (3, 1), (4, 1), (3, 8))
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert inertia(point_RQ, best) < inertia(point_RQ, one)


def test_the_start_finds_clusters_that_lie_far_apart():
    """A random start misses some of 24 clusters nearly always."""
    dice = torch.Generator().manual_seed(0)
    home = 100 * torch.randn(24, 8, generator=dice)
    point_RQ = home.repeat_interleave(10, 0) + torch.randn(240, 8, generator=dice)
    for seed in range(5):
        assert len({int(point) // 10 for point in spread_on_device(point_RQ, 24, seed)}) == 24
        lot = torch.randperm(240, generator=dice)[:24]
        assert len({int(point) // 10 for point in lot}) < 24


def test_fewer_kinds_of_points_than_clusters_leave_some_empty():
    point_RQ = torch.eye(4).repeat(5, 1)
    centre_EQ, cluster_R = kmeans_on_device(point_RQ, 6, 0, 1, 100, 1e-4)
    assert centre_EQ.isfinite().all() and inertia(point_RQ, centre_EQ) < 1e-6
    assert len(set(cluster_R.tolist())) == 4


def test_on_a_cpu_scikit_learn_does_it():
    point_RQ = sketches(1, 300)
    theirs = KMeans(6, n_init="auto", random_state=5).fit(point_RQ.numpy())
    centre_EQ, cluster_R = kmeans(point_RQ, 6, 5)
    assert np.array_equal(centre_EQ.numpy(), theirs.cluster_centers_)
    assert np.array_equal(cluster_R.numpy(), theirs.labels_)
    assert sorted(spread(point_RQ, 300, 0).tolist()) == list(range(300))
