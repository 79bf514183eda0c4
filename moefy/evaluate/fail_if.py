"""Conditions over a report's numbers, `dnll > 0.1`, that decide whether a pipeline goes on."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefy.config.options import nearest
from moefy.errors import MoefyError

BY_TEXT = ("dnll", "kl", "perplexity", "bits_per_byte", "top1_agreement")
"""Metrics of a text: a condition on one of them is checked on each."""

OVERALL = (
    "load_cv", "entropy", "dead", "drift", "prefill_ratio", "decode_ratio", "flagged",
    "benchmark_drop", "lost_expert", "not_run",
)  # fmt: skip
"""The worst value over all layers, texts, engines or tasks; or how many there are."""

BEHAVIOUR = {"loops": max, "stops": min, "json": min, "keys": min}
"""Shares of answers, and which one over the sets of prompts is the worst."""

OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
COMPARISON = re.compile(rf"\s*(\w+)\s*([<>]=?)\s*(?:(-?{NUMBER})|dense\s*([+-]\s*{NUMBER})?)\s*")

OVER_DENSE = " minus dense"
"""After the name of a metric: how far it is above that of the dense model."""


@dataclass(frozen=True)
class Condition:
    """Comparisons of a metric with a number: `and` joins them into groups, `or` the groups."""

    text: str
    groups: list[list[tuple[str, str, float]]]

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether it is true of these metrics."""
        return any(
            all(OPERATORS[sign](values[metric], number) for metric, sign, number in group)
            for group in self.groups
        )

    @property
    def metrics(self) -> set[str]:
        """The metrics that it names."""
        return {metric for group in self.groups for metric, _, _ in group}


def parse(text: str) -> Condition:
    """Read a condition: `METRIC > NUMBER`, with < <= > or >=, joined by `and` and `or`.

    `dense + NUMBER` stands for the dense model's value and more.

    >>> parse("dnll>0.1 or dead>0").metrics == {"dnll", "dead"}
    True
    >>> parse("loops > dense + 0.1").groups
    [[('loops minus dense', '>', 0.1)]]

    Raises:
        MoefyError: code 2, for anything else.
    """
    groups = [re.split(r"\band\b", group) for group in re.split(r"\bor\b", text)]
    return Condition(text, [[_comparison(part, text) for part in group] for group in groups])


def _comparison(part: str, text: str) -> tuple[str, str, float]:
    if (match := COMPARISON.fullmatch(part)) is None:
        raise MoefyError(
            f"--fail-if {text!r} cannot be understood; expected METRIC > NUMBER, such as "
            "'dnll>0.1 or dead>0', or 'loops > dense + 0.1'",
            code=2,
        )
    metric, sign, number, more = match.groups()
    of_dense = [*BY_TEXT, *BEHAVIOUR]
    if metric not in (*of_dense, *OVERALL):
        expected = nearest(metric, [*of_dense, *OVERALL])
        raise MoefyError(f"--fail-if {text!r}: unknown {metric}; {expected}", code=2)
    if number is not None:
        return metric, sign, float(number)
    if metric not in of_dense:
        raise MoefyError(
            f"--fail-if {text!r}: the dense model has no {metric}; {nearest(metric, of_dense)}",
            code=2,
        )
    return metric + OVER_DENSE, sign, float("".join((more or "0").split()))


def failures(condition: Condition, report: Mapping[str, Any], label: str) -> list[str]:
    """Why `label` fails the condition, one line for each text where it is true; empty if nowhere.

    A metric that was not measured fails, too: a gate must not open because nothing was measured.
    """
    overall = overall_metrics(report, label)
    rows: dict[str, Mapping[str, float]] = {"": {}}
    if {name.removesuffix(OVER_DENSE) for name in condition.metrics}.intersection(BY_TEXT):
        rows = {text: _text_metrics(row, label) for text, row in report.get("texts", {}).items()}
    if not rows:
        return [f"--fail-if {condition.text}: no text was scored"]
    lines = []
    for text, row in rows.items():
        values = {name: {**overall, **row}.get(name) for name in sorted(condition.metrics)}
        measured = {name: value for name, value in values.items() if value is not None}
        place = f" on {text}" if text else ""
        if missing := [name for name in values if name not in measured]:
            lines.append(f"--fail-if {condition.text}: {', '.join(missing)} was not measured")
        elif condition.holds(measured):
            reasons = ", ".join(f"{name} is {value:.4g}" for name, value in measured.items())
            lines.append(f"--fail-if {condition.text}: {reasons}{place}")
    return lines


def _text_metrics(row: Mapping[str, Any], label: str) -> dict[str, float]:
    """The metrics of a text that were measured, and how far they are above dense."""
    own, dense = row.get(label, {}), row.get("dense", {})
    known = [name for name in BY_TEXT if own.get(name) is not None]
    result = {name: own[name] for name in known}
    return result | {
        name + OVER_DENSE: own[name] - dense[name] for name in known if dense.get(name) is not None
    }


def overall_metrics(report: Mapping[str, Any], label: str) -> dict[str, float]:
    """The metrics over all texts that were measured."""
    result: dict[str, float] = {"not_run": len(report.get("not_run", []))}
    layers = report.get("routing", {}).get(label, {}).get("layers", [])
    if layers:
        result["load_cv"] = max(layer["load_cv"] for layer in layers)
        result["entropy"] = min(layer["entropy"] for layer in layers)
        result["dead"] = sum(layer["dead"] for layer in layers)
    drifts = [
        rows[label]["routing_drift"]
        for rows in report.get("robustness", {}).values()
        if rows.get(label, {}).get("routing_drift") is not None
    ]
    if drifts:
        result["drift"] = max(drifts)
    rows = [row for engine in report.get("speed", {}).values() for row in engine.get("rows", [])]
    for phase in ("prefill", "decode"):
        ratios = [row["ratio"] for row in rows if row["label"] == label and row["phase"] == phase]
        if ratios:
            result[f"{phase}_ratio"] = min(ratios)
    if report.get("prompts"):
        result["flagged"] = sum(row["flagged"] for row in report["prompts"])
    for name, worst in BEHAVIOUR.items():
        sets = report.get("behaviour", {}).get("sets", {}).values()
        shares = [one["figures"][label][name] for one in sets if name in one["figures"][label]]
        if shares:
            result[name] = worst(row["share"] for row in shares)
            result[name + OVER_DENSE] = worst(row["difference"] for row in shares)
    if (lost := report.get("lost_experts")) and lost["label"] == label:
        result["lost_expert"] = lost["worst"]
    scored = [rows[label] for rows in report.get("benchmarks", {}).values() if label in rows]
    if scored and not any("not_run" in row for row in scored):
        result["benchmark_drop"] = max((_drop(row) for row in scored), default=0.0)
    return result


def _drop(row: Mapping[str, Any]) -> float:
    """How much worse than dense a benchmark is, or 0 where that may be chance."""
    if row.get("p_value", 1.0) >= 0.05:
        return 0.0
    return max(0.0, -row["difference"] if row["higher_is_better"] else row["difference"])
