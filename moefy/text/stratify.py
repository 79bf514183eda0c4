"""An order of documents in which every beginning holds each kind of text in about its share."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.cluster.hierarchy import linkage
from sklearn.cluster import MiniBatchKMeans
from sklearn.feature_extraction.text import HashingVectorizer

KINDS = 16  # the number of kinds; fewer than twice as many documents are not sorted
BEGINNING = 2048  # characters at the start of a document that decide its kind

FEATURES = 2**12
"""Numbers that groups of three characters are hashed to."""

SAMPLE = 4096  # documents to cluster at most; the others go to the nearest kind


def spread(texts: list[str], most: int) -> list[int]:
    """The order of `texts` in which every beginning has about each kind's share of all.

    A kind is a cluster (k-means) of documents by their groups of three characters, which asks for
    neither a tokenizer nor spaces between words. The most similar kinds are joined first, the least
    similar sides, say prose and code, last. At each fork the side goes next that leaves both nearer
    to their shares: kinds, and kinds joined, stay within a few documents of theirs. Within a kind
    the order is that of `texts`. Shares count characters, and of a document only its first `most`.

    Source: stratified sampling with proportional allocation, the strata nested.
    """
    if len(texts) < 2 * KINDS:
        return list(range(len(texts)))
    kind_N, forks = _kinds(texts)
    waiting = [np.flatnonzero(kind_N == kind)[::-1].tolist() for kind in range(KINDS)]
    size_N = [min(len(text), most) for text in texts]
    # Of every kind, then of every fork, which are numbered as `linkage` does: sums below it.
    whole = [sum(size_N[n] for n in members) for members in waiting]
    count = [len(members) for members in waiting]
    for one, other in forks:
        whole.append(whole[one] + whole[other])
        count.append(count[one] + count[other])
    mean = [size / max(1, num) for size, num in zip(whole, count, strict=True)]
    done = [0] * len(whole)

    def off(fork: int, side: int) -> float:
        """How far `side` would be from its share of what the fork has had, if it went next."""
        if not count[side]:
            return float("inf")
        taken = done[fork] + mean[side]
        return abs(done[side] + mean[side] - taken * whole[side] / max(1, whole[fork]))

    order: list[int] = []
    while len(order) < len(texts):
        path = [len(whole) - 1]
        while path[-1] >= KINDS:
            fork = path[-1]
            path.append(min(forks[fork - KINDS], key=lambda side: off(fork, side)))
        order.append(waiting[path[-1]].pop())
        for node in path:
            done[node] += size_N[order[-1]]
            count[node] -= 1
    return order


def _kinds(texts: list[str]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The kind of each text (N,), and which two kinds or earlier forks each fork joins."""
    read: Any = HashingVectorizer(
        analyzer="char", ngram_range=(3, 3), n_features=FEATURES, alternate_sign=False, norm="l1"
    )
    # Roots of shares, whose distance is Hellinger's: else a few frequent groups are all there is.
    root_NV = read.transform(text[:BEGINNING] for text in texts).sqrt()
    # Mini-batch k-means gives the same clusters with any number of threads, as long as no sum of
    # distances decides when it stops.
    clusters: Any = MiniBatchKMeans(
        KINDS,
        max_iter=20,
        max_no_improvement=None,  # pyright: ignore[reportArgumentType]
        compute_labels=False,
        random_state=0,
    ).fit(root_NV[:: max(1, -(-len(texts) // SAMPLE))])
    joined = linkage(clusters.cluster_centers_, "ward")[:, :2].astype(int).tolist()
    return clusters.predict(root_NV), [(one, other) for one, other in joined]
