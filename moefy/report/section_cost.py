"""What the conversion gave: speed, size and compute."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moefy.report import figures
from moefy.report.chart import Look
from moefy.report.document import Picture, Section, Table
from moefy.report.format import computed_in, fixed, large, row_dtype

Looks = Mapping[str, Look]

PHASES = {"prefill": "Reading a prompt", "decode": "Writing"}


def speed(report: Mapping[str, Any], looks: Looks) -> Section:
    """Tokens per second against dense, for each engine and phase."""
    pictures, tables = [], []
    for number, (engine, told) in enumerate(report["speed"].items()):
        for phase, title in PHASES.items():
            rows = [row for row in told["rows"] if row["phase"] == phase]
            drawn = _lines(rows, looks)
            if not drawn:
                continue
            alt = f"Speed in {engine}, {phase}, relative to the dense model. " + "; ".join(
                f"{line.name}: "
                + ", ".join(f"{y:.2f} at batch {x:g}" for x, y in zip(line.x, line.y, strict=True))
                for line in drawn
            )
            ideal = _ideal(told, phase, [row["label"] for row in rows if row["label"] != "dense"])
            alt += f"; ideal {ideal[-1][1]:.2f}" if ideal else ""
            draw = partial(figures.speed, drawn, ideal=ideal, x_axis="sequences at once (batch)")
            name = f"speed-{number}-{phase}"
            pictures.append(Picture(name, f"{title} ({phase}) in {engine}", alt, draw))
        tables.append(_speed_table(engine, told))
    lead = (
        "Speed relative to the dense model on the same machine, measured in turns: medians, and "
        "the spread as a band. Each model runs in the dtype in which it is fastest there, of those "
        "that were tried. The ideal is what the arithmetic that is saved would give if all "
        "else cost nothing.",
    )
    return Section("speed", "Is it faster?", lead, tuple(pictures), tuple(tables))


def _ideal(told: Mapping[str, Any], phase: str, labels: list[str]) -> list[tuple[float, float]]:
    """What arithmetic would allow at each batch, of the last of `labels`: all have one shape."""
    ideals = told.get("ideal_ratio") or {}
    found = next((ideals[label] for label in reversed(labels) if label in ideals), ideals)
    value = found.get(phase)
    if isinstance(value, Mapping):
        return sorted((float(batch), ratio) for batch, ratio in value.items())
    batches = sorted({row["batch"] for row in told["rows"]})
    return [] if value is None else [(batch, value) for batch in batches]


def _lines(rows: list[Mapping[str, Any]], looks: Looks) -> list[figures.Line]:
    """One line for each model and context length: ratios by batch."""
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        if row["label"] != "dense" and row.get("ratio") is not None:
            groups.setdefault((row["label"], row.get("context")), []).append(row)
    several = len({context for _, context in groups}) > 1
    drawn = []
    for (label, context), found in groups.items():
        ends = [(row.get("ratio_low"), row.get("ratio_high")) for row in found]
        spread = [(low, high) for low, high in ends if low is not None and high is not None]
        known = len(spread) == len(found)
        first = next(key for key in groups if key[0] == label)
        drawn.append(
            figures.Line(
                f"{label}, {context} tokens" if several else label,
                looks[label],
                [row["batch"] for row in found],
                [row["ratio"] for row in found],
                [low for low, _ in spread] if known else [],
                [high for _, high in spread] if known else [],
                dashed=first != (label, context),
            )
        )
    return drawn


def _speed_table(engine: str, told: Mapping[str, Any]) -> Table:
    words = list(dict.fromkeys(_values(told.get("implementation"))))
    if told.get("threads"):
        words.append(f"{told['threads']} threads" if told["threads"] > 1 else "1 thread")
    words += _values(told.get("processor"))
    rows = tuple(
        (
            f"{row['phase']}, batch {row['batch']}"
            + (f", context {row['context']}" if row.get("context") else ""),
            row["label"],
            row_dtype(told, row),
            fixed(row["tokens_per_second"], 1),
            *([""] * 3 if row["label"] == "dense" else _relative(told, row)),
        )
        for row in told["rows"]
    )
    header = ("what", "model", "dtype", "tokens/s", "times dense", "over rounds", "ideal")
    named = ", ".join(str(word) for word in words if word)
    caption = f"Speed in {engine}" + (f" ({named})" if named else "")
    return Table(caption, header, rows, folded=True)


def _relative(engine: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[str, str, str]:
    """A speed relative to the dense model's, its least and its greatest, and the ideal."""
    low, high = row.get("ratio_low"), row.get("ratio_high")
    spread = "" if low is None else f"{fixed(low)} to {fixed(high)}"
    ideal = dict(_ideal(engine, row["phase"], [row["label"]])).get(row["batch"])
    return fixed(row.get("ratio")), spread, fixed(ideal)


def _values(told: Any) -> list[str]:
    """What is told of all models, or of each."""
    return [
        str(value) for value in (told.values() if isinstance(told, Mapping) else [told]) if value
    ]


def size(report: Mapping[str, Any], looks: Looks) -> Section:
    """Parameters, FLOPs and memory."""
    models = report["models"]
    bars = [
        (label, looks[label], told["parameters_active"] / 1e6, told["parameters_total"] / 1e6)
        for label, told in models.items()
        if told.get("parameters_total") and told.get("parameters_active")
    ]
    pictures = []
    if bars:
        alt = "Parameters in millions, active of total. " + ", ".join(
            f"{label}: {active:,.1f} of {total:,.1f}" for label, _, active, total in bars
        )
        draw = partial(
            figures.bars, bars, axis="million parameters", inner="active per token", outer="all"
        )
        pictures.append(Picture("parameters", "Parameters", alt, draw))
    header = (
        "model", "parameters", "active", "FLOPs/token", "weights", "KV cache/token",
        f"peak memory{computed_in(report)}",
    )  # fmt: skip
    rows = tuple(
        (
            label,
            large(told.get("parameters_total")),
            large(told.get("parameters_active")),
            large(told.get("flops_per_token")),
            large(told.get("weight_bytes"), "B"),
            large(told.get("kv_bytes_per_token"), "B"),
            large(told.get("peak_bytes"), "B"),
        )
        for label, told in models.items()
        if told.get("parameters_total")
    )
    tables = (Table("Size and compute", header, rows),) if rows else ()
    lead = (
        "All experts are in memory, active or not: a Mixture of Experts saves compute and what is "
        "read from memory for a token, not memory itself.",
    )
    return Section("size", "Size and compute", lead, tuple(pictures), tables)
