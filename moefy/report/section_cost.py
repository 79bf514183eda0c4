"""Speed, size and compute of the models."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moefy.report import figures
from moefy.report.chart import Looks
from moefy.report.document import Picture, Section, Table
from moefy.report.format import computed_in, fixed, large

PHASES = {"prefill": "Reading a prompt", "decode": "Writing"}


def speed(report: Mapping[str, Any], looks: Looks) -> Section:
    """Tokens per second against dense, for each engine and phase."""
    pictures, tables = [], []
    for number, (engine, measured) in enumerate(report["speed"].items()):
        for phase, title in PHASES.items():
            rows = [row for row in measured["rows"] if row["phase"] == phase]
            drawn = _lines(rows, looks)
            if not drawn:
                continue
            alt = f"Speed in {engine}, {phase}, relative to the dense model. " + "; ".join(
                f"{line.name}: "
                + ", ".join(f"{y:.2f} at batch {x:g}" for x, y in zip(line.x, line.y, strict=True))
                for line in drawn
            )
            moes = [row["label"] for row in rows if row["label"] != "dense"]
            ideal = _ideal(measured, phase, moes)
            alt += f"; ideal {ideal[-1][1]:.2f}" if ideal else ""
            draw = partial(figures.speed, drawn, ideal)
            name = f"speed-{number}-{phase}"
            pictures.append(Picture(name, f"{title} ({phase}) in {engine}", alt, draw))
        tables.append(_speed_table(engine, measured))
    lead = (
        "Speed relative to the dense model on the same machine. The models are measured in turns; "
        "lines are medians over the rounds, bands their range. Each model runs in its fastest "
        "dtype. The ideal is the speed if only arithmetic took time.",
    )
    return Section("speed", "Is it faster?", lead, tuple(pictures), tuple(tables))


def _ideal(measured: Mapping[str, Any], phase: str, labels: list[str]) -> list[tuple[float, float]]:
    """The speed by arithmetic alone at each batch, of the last of `labels`: all have one shape."""
    ideals = measured["ideal_ratio"]
    value = next((ideals[label][phase] for label in reversed(labels) if label in ideals), {})
    if isinstance(value, Mapping):
        return sorted((float(batch), ratio) for batch, ratio in value.items())
    return [(batch, value) for batch in sorted({row["batch"] for row in measured["rows"]})]


def _lines(rows: list[Mapping[str, Any]], looks: Looks) -> list[figures.Line]:
    """One line for each model and context length: ratios by batch."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        if row["label"] != "dense":
            groups.setdefault((row["label"], row["context"]), []).append(row)
    several = len({context for _, context in groups}) > 1
    return [
        figures.Line(
            f"{label}, {context} tokens" if several else label,
            looks[label],
            [row["batch"] for row in points],
            [row["ratio"] for row in points],
            [row["ratio_low"] for row in points],
            [row["ratio_high"] for row in points],
            dashed=next(key for key in groups if key[0] == label) != (label, context),
        )
        for (label, context), points in groups.items()
    ]


def _speed_table(engine: str, measured: Mapping[str, Any]) -> Table:
    ways = measured["implementation"]
    words = [*dict.fromkeys([ways] if isinstance(ways, str) else map(str, ways.values()))]
    words.append(f"{measured['threads']} threads" if measured["threads"] > 1 else "1 thread")
    words += [measured["processor"]] if measured.get("processor") else []
    words += [device] if (device := measured.get("device", "cpu")) != "cpu" else []
    dtype = measured["dtype"]  # of each model, where rows lack theirs
    by_label = dtype if isinstance(dtype, dict) else {}
    rows = tuple(
        (
            f"{row['phase']}, batch {row['batch']}, context {row['context']}",
            row["label"],
            row.get("dtype") or by_label.get(row["label"], dtype),
            fixed(row["tokens_per_second"], 1),
            *([""] * 3 if row["label"] == "dense" else _relative(measured, row)),
        )
        for row in measured["rows"]
    )
    header = ("what", "model", "dtype", "tokens/s", "times dense", "over rounds", "ideal")
    return Table(f"Speed in {engine} ({', '.join(words)})", header, rows, folded=True)


def _relative(engine: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, str, str]:
    """A speed relative to the dense model's, its least and its greatest, and the ideal."""
    spread = f"{fixed(row['ratio_low'])} to {fixed(row['ratio_high'])}"
    ideal = dict(_ideal(engine, row["phase"], [row["label"]])).get(row["batch"])
    return fixed(row["ratio"]), spread, fixed(ideal)


def size(report: Mapping[str, Any], looks: Looks) -> Section:
    """Parameters, FLOPs and memory."""
    models = {
        label: model
        for label, model in report["models"].items()
        if model.get("kind") not in ("control", "rival")
    }
    bars = [
        (label, looks[label], model["parameters_active"] / 1e6, model["parameters_total"] / 1e6)
        for label, model in models.items()
        if model.get("parameters_total") and model.get("parameters_active")
    ]
    pictures = []
    if bars:
        alt = "Parameters in millions, active of total. " + ", ".join(
            f"{label}: {active:,.1f} of {total:,.1f}" for label, _, active, total in bars
        )
        draw = partial(figures.parameters, bars)
        pictures.append(Picture("parameters", "Parameters", alt, draw))
    header = (
        "model", "parameters", "active", "FLOPs/token", "weights", "KV cache/token",
        f"peak memory{computed_in(report)}",
    )  # fmt: skip
    rows = tuple(
        (
            label,
            large(model.get("parameters_total")),
            large(model.get("parameters_active")),
            large(model.get("flops_per_token")),
            large(model.get("weight_bytes"), "B"),
            large(model.get("kv_bytes_per_token"), "B"),
            large(model.get("peak_bytes"), "B"),
        )
        for label, model in models.items()
        if model.get("parameters_total")
    )
    tables = (Table("Size and compute", header, rows),) if rows else ()
    lead = (
        "All experts are in memory, active or not. A Mixture of Experts saves compute and memory "
        "traffic per token, not memory.",
    )
    return Section("size", "Size and compute", lead, tuple(pictures), tables)
