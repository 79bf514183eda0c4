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
    "benchmark_drop", "not_run",
)  # fmt: skip
"""The worst value over all layers, texts, engines or tasks; or how many there are."""

OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
COMPARISON = re.compile(r"\s*(\w+)\s*([<>]=?)\s*(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*")


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

    >>> parse("dnll>0.1 or dead>0").metrics == {"dnll", "dead"}
    True

    Raises:
        MoefyError: code 2, for anything else.
    """
    groups = [re.split(r"\band\b", group) for group in re.split(r"\bor\b", text)]
    return Condition(text, [[_comparison(part, text) for part in group] for group in groups])


def _comparison(part: str, text: str) -> tuple[str, str, float]:
    if (match := COMPARISON.fullmatch(part)) is None:
        raise MoefyError(
            f"--fail-if {text!r} cannot be understood; expected METRIC > NUMBER, such as "
            "'dnll>0.1 or dead>0'",
            code=2,
        )
    metric, sign, number = match.groups()
    if metric not in BY_TEXT + OVERALL:
        expected = nearest(metric, [*BY_TEXT, *OVERALL])
        raise MoefyError(f"--fail-if {text!r}: unknown {metric}; {expected}", code=2)
    return metric, sign, float(number)


def failures(condition: Condition, report: Mapping[str, Any], label: str) -> list[str]:
    """Why `label` fails the condition, one line for each text where it is true; empty if nowhere.

    A metric that was not measured fails, too: a gate must not open because nothing was measured.
    """
    overall = overall_metrics(report, label)
    rows: dict[str, Mapping[str, float]] = {"": {}}
    if condition.metrics.intersection(BY_TEXT):
        rows = {text: row.get(label, {}) for text, row in report.get("texts", {}).items()}
    if not rows:
        return [f"--fail-if {condition.text}: no text was scored"]
    lines = []
    for text, row in rows.items():
        values = {
            name: row.get(name) if name in BY_TEXT else overall.get(name)
            for name in sorted(condition.metrics)
        }
        measured = {name: value for name, value in values.items() if value is not None}
        place = f" on {text}" if text else ""
        if missing := [name for name in values if name not in measured]:
            lines.append(f"--fail-if {condition.text}: {', '.join(missing)} was not measured")
        elif condition.holds(measured):
            reasons = ", ".join(f"{name} is {value:.4g}" for name, value in measured.items())
            lines.append(f"--fail-if {condition.text}: {reasons}{place}")
    return lines


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
    scored = [rows[label] for rows in report.get("benchmarks", {}).values() if label in rows]
    if scored and not any("not_run" in row for row in scored):
        result["benchmark_drop"] = max((_drop(row) for row in scored), default=0.0)
    return result


def _drop(row: Mapping[str, Any]) -> float:
    """How much worse than dense a benchmark is, or 0 where that may be chance."""
    if row.get("p_value", 1.0) >= 0.05:
        return 0.0
    return max(0.0, -row["difference"] if row["higher_is_better"] else row["difference"])
