"""Conditions over a report's numbers, `dnll > 0.1`, that decide whether a pipeline goes on."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
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

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


@dataclass(frozen=True)
class Condition:
    """A condition that was read and found good."""

    text: str
    tree: ast.expr


def parse(text: str) -> Condition:
    """Read a condition: comparisons of metrics and numbers by < <= > >=, joined by and, or, not.

    Raises:
        MoefyError: code 2, for anything else; nothing of it is ever run as Python.
    """
    wrong = f"--fail-if {text!r} cannot be understood; expected something like 'dnll>0.1 or dead>0'"
    if len(text) > 500:
        raise MoefyError("--fail-if takes at most 500 characters", code=2)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise MoefyError(wrong, code=2) from None
    for name in _names(tree, wrong):
        if name not in METRICS:
            raise MoefyError(
                f"--fail-if {text!r}: unknown {name}; {nearest(name, [*METRICS])}", code=2
            )
    return Condition(text, tree)


def _names(node: ast.expr, wrong: str) -> Iterator[str]:
    """The metrics of a condition; refuses what is no condition."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _names(value, wrong)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _names(node.operand, wrong)
    elif isinstance(node, ast.Compare) and all(type(op) in COMPARISONS for op in node.ops):
        for side in (node.left, *node.comparators):
            if isinstance(side, ast.Name):
                yield side.id
            elif _number(side) is None:
                raise MoefyError(wrong, code=2)
    else:
        raise MoefyError(wrong, code=2)


def _number(node: ast.expr) -> float | None:
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node, sign = node.operand, -1
    value = node.value if isinstance(node, ast.Constant) else None
    return sign * value if isinstance(value, int | float) and value is not True else None


def failures(condition: Condition, report: Mapping[str, Any], label: str) -> list[str]:
    """Why `label` fails the condition, one line for each text where it is true; empty if nowhere.

    A metric that was not measured fails, too: a gate must not open because nothing was looked at.
    """
    used = {node.id for node in ast.walk(condition.tree) if isinstance(node, ast.Name)}
    overall = overall_metrics(report, label)
    places: dict[str, Mapping[str, float]] = {"": {}}
    if used & BY_TEXT.keys():
        places = {text: rows.get(label, {}) for text, rows in report.get("texts", {}).items()}
    found = []
    if not places:
        return [f"--fail-if {condition.text}: no text was scored"]
    for place, row in places.items():
        values = {name: row.get(name) if name in BY_TEXT else overall.get(name) for name in used}
        if missing := sorted(name for name, value in values.items() if value is None):
            found.append(f"--fail-if {condition.text}: {', '.join(missing)} was not measured")
        elif _true(condition.tree, values):
            told = ", ".join(f"{name} is {value:.4g}" for name, value in sorted(values.items()))
            found.append(f"--fail-if {condition.text}: {told}" + (f" on {place}" if place else ""))
    return found


def _true(node: ast.expr, values: Mapping[str, Any]) -> bool:
    if isinstance(node, ast.BoolOp):
        parts = [_true(value, values) for value in node.values]
        return all(parts) if isinstance(node.op, ast.And) else any(parts)
    if isinstance(node, ast.UnaryOp):
        return not _true(node.operand, values)
    assert isinstance(node, ast.Compare)
    sides = [
        values[side.id] if isinstance(side, ast.Name) else _number(side)
        for side in (node.left, *node.comparators)
    ]
    pairs = zip(sides, sides[1:], node.ops, strict=False)
    return all(COMPARISONS[type(op)](left, right) for left, right, op in pairs)


def overall_metrics(report: Mapping[str, Any], label: str) -> dict[str, float]:
    """The metrics that are no text's, of those that were measured."""
    found: dict[str, float] = {"not_run": len(report.get("not_run", []))}
    layers = report.get("routing", {}).get(label, {}).get("layers", [])
    if layers:
        found["load_cv"] = max(layer["load_cv"] for layer in layers)
        found["entropy"] = min(layer["entropy"] for layer in layers)
        found["dead"] = sum(layer["dead"] for layer in layers)
    drifts = [
        rows[label]["routing_drift"]
        for rows in report.get("robustness", {}).values()
        if rows.get(label, {}).get("routing_drift") is not None
    ]
    if drifts:
        found["drift"] = max(drifts)
    rows = [row for engine in report.get("speed", {}).values() for row in engine.get("rows", [])]
    for phase in ("prefill", "decode"):
        ratios = [row["ratio"] for row in rows if row["label"] == label and row["phase"] == phase]
        if ratios:
            found[f"{phase}_ratio"] = min(ratios)
    if report.get("prompts"):
        found["flagged"] = sum(row["flagged"] for row in report["prompts"])
    scored = [rows[label] for rows in report.get("benchmarks", {}).values() if label in rows]
    if scored and not any("not_run" in row for row in scored):
        found["benchmark_drop"] = max((_drop(row) for row in scored), default=0.0)
    return found


def _drop(row: Mapping[str, Any]) -> float:
    """How much worse than dense a benchmark is, when that is no chance."""
    if row.get("p_value", 1.0) >= 0.05:
        return 0.0
    return max(0.0, -row["difference"] if row["higher_is_better"] else row["difference"])
