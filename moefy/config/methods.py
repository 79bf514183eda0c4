"""Published methods by name: the settings of a recipe that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHODS: Mapping[str, Mapping[str, Any]] = {
    # This package: see `moefy.convert`.
    "ours": {},
    # CMoE (arXiv 2502.04416). No stock class holds its router, so it is for reports only.
    "cmoe": {"partition": "cmoe", "router": "cmoe", "refit": False},
    # MoEfication (arXiv 2110.01786). Its router, a network of two layers, fits no stock class: it
    # has ours.
    "moefication": {"partition": "moefication", "refit": False},
    # LLaMA-MoE v2 (arXiv 2411.15708), without its training.
    "llama-moe-v2": {"partition": "llama-moe-v2", "router": "llama-moe-v2", "refit": False},
    # ExpertWeaver (arXiv 2602.15521).
    "expertweaver": {"partition": "expertweaver", "router": "expertweaver", "refit": False},
    # FLAP (arXiv 2312.11983): static pruning by its criterion, without its bias behind down_proj,
    # which no stock class has.
    "flap": {
        "partition": "static",
        "partition_options": {"metric": "fluctuation"},
        "refit": False,
    },
    # Sparse upcycling (arXiv 2212.05055): a start for training, in which the experts are copies.
    "upcycle": {"partition": "copies", "router": "clusters", "refit": False, "active": 1.0},
}
"""What each sets; the other keys of `PARTS` have the defaults of `Recipe`, which are ours."""

COPIES = "copies"
"""The partition whose experts are copies."""

PARTS = (
    "partition", "partition_options", "router", "router_options", "refit", "drift", "polish",
)  # fmt: skip
"""The keys of a recipe that make up a method."""

FORMER_PARTITIONS = {
    "coactivation": "cmoe",
    "weights": "moefication",
    "gradient": "llama-moe-v2",
}
FORMER_ROUTERS = {
    "representative": "cmoe",
    "centroids": "llama-moe-v2",
    "gates": "expertweaver",
}
"""Names of earlier versions, and what they are called now."""
