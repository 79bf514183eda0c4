"""What every model of a report costs and loses, and which of them are better than the run.

The rule: a rival is better where it costs about as little and loses clearly less, or loses about as
little and costs clearly less. "About" and "clearly" part at 5 %. The run is a best point where no
rival is better. The cost at batch 1 is the bytes of weights that a token reads; for prefill and
large batches it is the multiply-adds of a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

AXES = ("bytes_read", "operations")

SLACK = 1.05

OWN = re.compile(r"(converted|finetuned)( \d+)?( q\d\w+)?")
"""Labels of the stages of the run, and of these in other types."""

Point = Mapping[str, Any]


def points(texts: Mapping[str, Any], models: Mapping[str, Any], main: str) -> list[dict[str, Any]]:
    """Loss and cost of every model on every text, and the rivals that are better than the run."""
    result: list[dict[str, Any]] = []
    for text, rows in texts.items():
        some = [
            _point(label, row, models, main) | {"text": text}
            for label, row in rows.items()
            if label in models
        ]
        for point in some:
            if point["own"]:
                # In another type the run computes as much and loses more: only bytes are compared.
                axes = AXES if point["kind"] != "rival" else AXES[:1]
                point["better"] = {axis: better(point, some, axis) for axis in axes}
        result += some
    return result


def _point(
    label: str, row: Mapping[str, Any], models: Mapping[str, Any], main: str
) -> dict[str, Any]:
    oracle = label.startswith("oracle")
    sizes = models[main if oracle else label]
    operations = sizes.get("flops_per_token")
    return {
        "label": label,
        "kind": models[label]["kind"],
        "own": bool(OWN.fullmatch(label)),
        "a_model": not oracle,
        "dnll": row["dnll"],
        "kl": row["kl"],
        "bytes_read": sizes.get("bytes_read"),
        "operations": operations and operations // 2,
    }


def averages(points: Iterable[Point]) -> list[Point]:
    """The points of each model that was scored on all texts as one, with the mean KL."""
    by_label: dict[str, list[Point]] = {}
    for point in points:
        by_label.setdefault(point["label"], []).append(point)
    most = max(map(len, by_label.values()), default=0)
    return [
        {**some[0], "kl": fmean(point["kl"] for point in some)}
        for some in by_label.values()
        if len(some) == most
    ]


def rivals(points: Sequence[Point], axis: str) -> list[Point]:
    """Real models that are not of the run and whose cost is known."""
    return [p for p in points if not p["own"] and p["a_model"] and p[axis] is not None]


def better(own: Point, points: Sequence[Point], axis: str) -> str | None:
    """The rival that is better by the rule and loses least; None if there is none."""
    if own[axis] is None:
        return None
    beating = [
        rival
        for rival in rivals(points, axis)
        if rival[axis] <= SLACK * own[axis]
        and rival["kl"] <= SLACK * own["kl"]
        and (SLACK * rival[axis] < own[axis] or SLACK * rival["kl"] < own["kl"])
    ]
    return min(beating, key=lambda p: (p["kl"], p[axis]))["label"] if beating else None
