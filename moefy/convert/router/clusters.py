"""A router of copies: a row is the centre of a cluster of inputs, and loads are even."""

from __future__ import annotations

from typing import Annotated

import torch

from moefy.convert.cluster import token_centroids
from moefy.convert.load_balance import balance
from moefy.convert.routed_ffn import level
from moefy.types import FFN, Partition, Profile, Range, Router, Shape


def fit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    *,
    generator: torch.Generator,
    load_cv: Annotated[float, Range(0)] = 0.25,
) -> Router:
    """Cluster the tokens' inputs by k-means, and even out the load of the rows (see `balance`)
    until its coefficient of variation is at most `load_cv`; 0 leaves it as it is.

    Copies start alike, so nothing says which one a token needs: similar tokens share one, and all
    get as many. Their scores have variance one, as those of `random` rows.
    """
    x_TD, _ = profile.inputs()
    rows_ED = level(token_centroids(profile, shape.num_experts, generator), x_TD)
    if load_cv and shape.experts_per_token < shape.num_experts:
        worth_TE = rows_ED.new_ones(len(x_TD), shape.num_experts)
        k = shape.experts_per_token
        rows_ED, _ = balance(rows_ED, x_TD, worth_TE, k, load_cv, profile.gram_DD)
        rows_ED = level(rows_ED, x_TD)
    return Router(rows_ED)
