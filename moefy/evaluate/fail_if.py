"""Conditions over a report's numbers, `dnll > 0.1`, that decide whether a pipeline goes on."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefy.config.options import nearest
from moefy.errors import MoefyError

BY_TEXT = {
    name: f"{name} on any text"
    for name in ("dnll", "kl", "perplexity", "bits_per_byte", "top1_agreement")
}
OVERALL = {
    "load_cv": "largest coefficient of variation of a layer's load",
    "entropy": "smallest entropy of a layer's load",
    "dead": "dead experts in all layers",
    "drift": "largest routing drift in any condition",
    "prefill_ratio": "smallest prefill speed relative to dense, over engines, batches, contexts",
    "decode_ratio": "smallest decoding speed relative to dense",
    "flagged": "prompts flagged because their answers' likelihood fell most",
    "benchmark_drop": "largest loss of a benchmark against dense that is significant (p < 0.05)",
    "not_run": "parts that were not run",
}
METRICS = BY_TEXT | OVERALL

OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
COMPARISON = re.compile(r"\s*(\w+)\s*([<>]=?)\s*(-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*")


@dataclass(frozen=True)
class Comparison:
    """One metric against one number."""

    metric: str
    operator: str
    number: float

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether it is true of these metrics."""
        return OPERATORS[self.operator](values[self.metric], self.number)


@dataclass(frozen=True)
class Condition:
    """Comparisons that `and` joins into groups, and `or` the groups."""

    text: str
    groups: tuple[tuple[Comparison, ...], ...]

    def holds(self, values: Mapping[str, float]) -> bool:
        """Whether it is true of these metrics."""
        return any(all(part.holds(values) for part in group) for group in self.groups)

    @property
    def metrics(self) -> set[str]:
        """The metrics that it names."""
        return {part.metric for group in self.groups for part in group}


def parse(text: str) -> Condition:
    """Read a condition: `METRIC > NUMBER`, with < <= > or >=, joined by `and` and `or`.

    >>> parse("dnll>0.1 or dead>0").metrics == {"dnll", "dead"}
    True

    Raises:
        MoefyError: code 2, for anything else.
    """
    groups = [re.split(r"\band\b", group) for group in re.split(r"\bor\b", text)]
    return Condition(text, tuple(tuple(_comparison(part, text) for part in g) for g in groups))


def _comparison(part: str, text: str) -> Comparison:
    if (match := COMPARISON.fullmatch(part)) is None:
        raise MoefyError(
            f"--fail-if {text!r} cannot be understood; expected METRIC > NUMBER, such as "
            "'dnll>0.1 or dead>0'",
            code=2,
        )
    metric, sign, number = match.groups()
    if metric not in METRICS:
        raise MoefyError(
            f"--fail-if {text!r}: unknown {metric}; {nearest(metric, [*METRICS])}", code=2
        )
    return Comparison(metric, sign, float(number))


def failures(condition: Condition, report: Mapping[str, Any], label: str) -> list[str]:
    """Why `label` fails the condition, one line for each text where it is true; empty if nowhere.

    A metric that was not measured fails, too: a gate must not open because nothing was measured.
    """
    overall = overall_metrics(report, label)
    rows: dict[str, Mapping[str, float]] = {"": {}}
    if condition.metrics & BY_TEXT.keys():
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
