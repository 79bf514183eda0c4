"""Lost experts: what the run loses without each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

from moefy.report.document import Picture, Section, Table
from moefy.report.format import computed_in, fixed, uncertain
from moefy.report.heatmaps import heat

HEADER = ("lost expert", "dNLL without it", "with its shadow")
SHOWN = 10
"""Experts in the table, the most critical first."""

LEAD = (
    "A device or a file may fail, and an expert with it. Here each one is taken out alone: its "
    "logit is minus infinity, so its tokens go to the next best expert. dNLL is the loss without "
    "it minus the loss with all experts, in nats per token. A shadow (`convert --shadow`) holds "
    "the expert's strongest neurons again, and answers in its place.",
)


def lost_experts(report: Mapping[str, Any]) -> Section:
    """The loss without each expert as a map, and the most critical ones by name."""
    lost = report["lost_experts"]
    if not lost:
        return Section("lost", "What if an expert is lost?")
    count = len(lost["experts"])
    means = (fixed(lost.get(key), 4) for key in ("mean", "shadow_mean"))
    summary = (
        (f"{lost['label']}: mean of {count:,} lost experts", *means),
        *rows(report)[:SHOWN],
    )
    caption = (
        f"Most critical experts, on {lost['tokens']:,} tokens in {lost['windows']} windows"
        f"{computed_in(report)}"
    )
    table = Table(caption, HEADER, summary)
    return Section("lost", "What if an expert is lost?", LEAD, _map(lost), (table,))


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The experts under `HEADER`, the most critical first."""
    experts = report["lost_experts"].get("experts", ())
    return [
        (
            f"layer {row['layer']}, expert {row['expert']}",
            uncertain(row["dnll"], row["standard_error"], 4),
            uncertain(row.get("shadow_dnll"), row.get("shadow_standard_error"), 4),
        )
        for row in sorted(experts, key=lambda row: -row["dnll"])
    ]


def _map(lost: Mapping[str, Any]) -> tuple[Picture, ...]:
    """Each expert's loss relative to the mean; none where only some experts were taken out."""
    layers = [
        (layer, [max(0.0, row["dnll"]) for row in some])
        for layer, some in itertools.groupby(lost["experts"], key=lambda row: row["layer"])
    ]
    total = sum(sum(losses) for _, losses in layers)
    if not total or len({len(losses) for _, losses in layers}) > 1 or len(layers[0][1]) < 2:
        return ()
    maps = {lost["label"]: [(layer, [loss / total * len(layers) for loss in losses])
                            for layer, losses in layers]}  # fmt: skip
    worst = max(lost["experts"], key=lambda row: row["dnll"])
    alt = (
        f"Loss without each expert in each layer; mean {lost['mean']:.4f} nats per token, worst "
        f"{worst['dnll']:.4f} without expert {worst['expert']} of layer {worst['layer']}. A cross "
        "is an expert whose loss costs nothing"
    )
    scale = ("costs less than the mean expert", "more")
    return (Picture("lost-experts", "Lost without each expert", alt, partial(heat, maps), scale),)
