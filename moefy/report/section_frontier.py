"""Loss against cost: everything that was measured, as two frontiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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

HEADER = ("model", "MB read", "M operations", "KL", "in words", "beaten by")

LEAD = (
    "At batch 1 the bytes of weights that a token reads decide the speed; for prefill and large "
    "batches its operations (multiply-adds) do. Lines go through the best points: no other model "
    "costs as little and loses as little. In the table, a model of the run is beaten where a rival "
    "costs about as little and loses clearly less, or loses about as little and costs clearly "
    "less; about and clearly part at 5 %. KL is the mean over the texts. The oracle, hollow, is a "
    "ceiling and no model. Attention's products with its cache, which all share, are not counted."
)


def frontier(report: Mapping[str, Any], looks: Looks) -> Section:
    """KL against bytes read and against operations, two pictures for each text."""
    points = _known(report)
    pictures = [
        picture
        for number, text in enumerate(dict.fromkeys(point["text"] for point in points))
        for picture in _pictures(number, text, points, looks, report.get("main"))
    ]
    notes = (flattered(report.get("rivals", {}).get("levels")), _fallbacks(report["models"]))
    tables = (Table("Loss against cost", HEADER, rows),) if (rows := table(report)) else ()
    lead = (LEAD, *filter(None, notes))
    return Section("frontier", "Loss against cost", lead, tuple(pictures), tables)


def _known(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points whose costs were measured; a report of an earlier moefy has none."""
    return [point for point in report["frontier"] if point.get("bytes_read")]


def _fallbacks(models: Mapping[str, Any]) -> str:
    """Which types hold most weights in another type, as rows do not fit theirs."""
    most = {}
    for label, model in models.items():
        name = max(types, key=types.__getitem__) if (types := model.get("types")) else ""
        if name and not label.lower().removesuffix("_m").endswith(name.lower()):
            most[label] = f"{name} in {label}"
    if not most:
        return ""
    return (
        "K-quants fit rows of multiples of 256 only, so llama.cpp falls back to other types: most "
        f"weights are {', '.join(most.values())}."
    )


def _pictures(
    number: int, text: str, points: list[Mapping[str, Any]], looks: Looks, main: str | None
) -> list[Picture]:
    pictures = []
    # Models that are the run in another type have its look, and compute as much: one point for all.
    forms = [p["label"] for p in points if p["own"] and p["label"].startswith(f"{main} ")]
    for key, (title, axis, places) in COSTS.items():
        spots = [
            figures.Spot(
                point["label"],
                looks[main if main and point["label"] in forms else point["label"]],
                point[key] / 1e6,
                point["kl"],
                point["a_model"],
            )
            for point in points
            if point["text"] == text and not (key == "operations" and point["label"] in forms)
        ]
        alt = f"KL to dense on {text} against {axis}. " + ", ".join(
            f"{spot.name} {spot.y:.3f} at {spot.x:.{places}f}" for spot in spots
        )
        draw = partial(figures.frontier, spots, BANDS, axis=axis)
        pictures.append(Picture(f"frontier-{number}-{key}", f"{title}, on {text}", alt, draw))
    return pictures


def table(report: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The rows under `HEADER`, the most bytes first."""
    models: dict[str, list[Mapping[str, Any]]] = {}
    for point in sorted(_known(report), key=lambda point: -point["bytes_read"]):
        models.setdefault(point["label"], []).append(point)
    return tuple(
        (
            label,
            *(fixed(points[0][key] / 1e6, places) for key, (_, _, places) in COSTS.items()),
            fixed(kl := fmean(point["kl"] for point in points), 3),
            "" if label == "dense" else band(kl),
            ", ".join(dict.fromkeys(_beaten(points))),
        )
        for label, points in models.items()
    )


def _beaten(points: list[Mapping[str, Any]]) -> Iterator[str]:
    """The rivals that are better than a model of the run, on any text."""
    for point in points:
        for key, (title, _, _) in COSTS.items():
            if name := point.get("better", {}).get(key):
                yield f"{name} ({title.split()[1]})"
