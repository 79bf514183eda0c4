"""Loss against cost: everything that was measured, as two frontiers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean
from typing import Any

from moefy.report import figures
from moefy.report.chart import Looks
from moefy.report.document import Picture, Section, Table
from moefy.report.format import BANDS, band, fixed, flattered

COSTS = {
    "bytes_read": ("By bytes read", "MB read per token at batch 1", 1),
    "operations": ("By operations", "million multiply-adds per token", 0),
}
"""Each cost: the title of its picture, its name in millions, and its decimal places."""

LEAD = (
    "At batch 1 the bytes of weights that a token reads decide the speed; for prefill and large "
    "batches the operations do. Lines go through the best points: no other model costs as little "
    "and loses as little. “Better” names the rival that costs about as little and loses clearly "
    "less, or loses about as little and costs clearly less; about and clearly part at 5 %. The "
    "oracle, hollow, is a ceiling and no model. Attention's products with its cache, which all "
    "models share, are not counted."
)


def frontier(report: Mapping[str, Any], looks: Looks) -> Section:
    """KL against bytes read and against operations, two pictures for each text."""
    points = _known(report)
    pictures = [
        picture
        for number, text in enumerate(dict.fromkeys(point["text"] for point in points))
        for picture in _pictures(number, text, points, looks, report.get("main"))
    ]
    note = flattered(report.get("rivals", {}).get("levels"))
    header, rows = table(report)
    tables = (Table("Loss against cost", header, rows),) if rows else ()
    lead = (LEAD, *([note] if note else []))
    return Section("frontier", "Loss against cost", lead, tuple(pictures), tables)


def _pictures(
    number: int, text: str, points: list[Mapping[str, Any]], looks: Looks, main: str | None
) -> list[Picture]:
    pictures = []
    for key, (title, axis, places) in COSTS.items():
        spots = [
            figures.Spot(
                point["label"],
                looks[main if main and point["label"].startswith(f"{main} ") else point["label"]],
                point[key] / 1e6,
                point["kl"],
                point["a_model"],
            )
            for point in points
            if point["text"] == text
        ]
        alt = f"KL to dense on {text} against {axis}. " + ", ".join(
            f"{spot.name} {spot.y:.3f} at {spot.x:.{places}f}" for spot in spots
        )
        draw = partial(figures.frontier, spots, BANDS, axis=axis)
        pictures.append(Picture(f"frontier-{number}-{key}", f"{title}, on {text}", alt, draw))
    return pictures


def _known(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points whose costs were measured; a report of an earlier moefy has none."""
    return [point for point in report["frontier"] if point.get("bytes_read")]


def table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows: each model's costs, its KL on each text, that in words, what is better."""
    points = _known(report)
    texts = tuple(dict.fromkeys(point["text"] for point in points))
    models: dict[str, dict[str, Mapping[str, Any]]] = {}
    for point in sorted(points, key=lambda point: -point["bytes_read"]):
        models.setdefault(point["label"], {})[point["text"]] = point
    header = ("model", *(name for _, name, _ in COSTS.values()))
    header += (*(f"KL on {text}" for text in texts), "in words")
    header += ("better by bytes", "better by operations")
    rows = []
    for label, by_text in models.items():
        first = next(iter(by_text.values()))
        costs = (fixed(first[key] / 1e6, places) for key, (_, _, places) in COSTS.items())
        kls = (fixed(by_text[text]["kl"], 3) if text in by_text else "" for text in texts)
        words = band(fmean(point["kl"] for point in by_text.values()))
        rows.append(
            (
                label,
                *costs,
                *kls,
                "" if label == "dense" else words,
                *(_better([*by_text.values()], key) for key in COSTS),
            )
        )
    return header, tuple(rows)


def _better(points: list[Mapping[str, Any]], key: str) -> str:
    """The rivals that are better than the run, on any text; empty for what is not of the run."""
    if not points[0].get("own"):
        return ""
    names = dict.fromkeys(point["better"][key] or "none" for point in points)
    return ", ".join(names)
