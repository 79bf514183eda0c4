"""LLaMA-MoE v2's router: an expert's row is the centroid of the tokens it was made for."""

from __future__ import annotations

import torch

from moefy.convert.cluster import token_centroids
from moefy.convert.routed_ffn import level
from moefy.types import FFN, Partition, Profile, Router, Shape

PARTITION = "llama-moe-v2"
"""The partition whose experts are made for these clusters of tokens, in this order."""


def fit(
    ffn: FFN, profile: Profile, partition: Partition, shape: Shape, *, generator: torch.Generator
) -> Router:
    """Cluster the tokens' inputs by k-means, as the partition did; the centroids are the rows.

    Source: LLaMA-MoE v2 (arXiv 2411.15708) and its code, which keeps the clusters' sizes within 40%
    of each other's mean; ours may have any size.
    """
    return Router(level(token_centroids(profile, shape.num_experts, generator), profile.x_TD))
