"""A report's sections in reading order, its headline and its advice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefy.config.recipe import method_of
from moefy.report import (
    section_behaviour,
    section_cost,
    section_experts,
    section_frontier,
    section_lost,
    section_quality,
    section_quantized,
    section_tuned,
)
from moefy.report.chart import looks
from moefy.report.document import Section, Table
from moefy.report.format import fixed, large, model_name, shape_text, times

VERDICTS = {"pays": "▲", "does not pay": "▼", "not measured": "○"}
"""The signs of the advice, for readers who do not see its colours."""

CLEAR = 0.05
"""The least difference in speed that is named; the same as that of the advice."""


@dataclass(frozen=True)
class Tile:
    """One figure of the headline: `word` says in a word or two whether it is good."""

    value: str
    name: str
    word: str = ""
    good: bool | None = None


def labels(report: Mapping[str, Any]) -> dict[str, str]:
    """The kind of each model in the report, the dense one first."""
    kinds = {label: str(entry.get("kind", "other")) for label, entry in report["models"].items()}
    scored = (report[part] for part in ("texts", "robustness", "benchmarks"))
    named = [label for scores in scored for rows in scores.values() for label in rows]
    named += [label for entry in report["generation"] for label in entry["written"]]
    named += [row["label"] for entry in report["speed"].values() for row in entry["rows"]]
    named += [*report["routing"], *report["finetune"]]
    for label in named:
        kinds.setdefault(label, "dense" if label == "dense" else "other")
    for point in report["frontier"]:
        kinds.setdefault(point["label"], point.get("kind", "other"))
    order = ("dense", "converted", "finetuned", "control", "rival", "other")
    return dict(
        sorted(kinds.items(), key=lambda item: order.index(item[1]) if item[1] in order else 9)
    )


def subject(report: Mapping[str, Any]) -> str | None:
    """The main model of the report: the one it names, else the last stage of the run."""
    kinds = labels(report)
    if report.get("main") in kinds:
        return report["main"]
    for kind in ("finetuned", "converted"):
        if candidates := [label for label, of in kinds.items() if of == kind]:
            return candidates[-1]
    return None


def sections(report: Mapping[str, Any]) -> list[Section]:
    """The sections that are not empty."""
    shown = looks(labels(report))
    parts = [
        section_quality.quality(report, shown),
        section_frontier.frontier(report, shown),
        section_quantized.quantized(report),
        section_cost.speed(report, shown),
        section_cost.size(report, shown),
        section_quality.benchmarks(report, shown),
        section_quality.generation(report),
        section_behaviour.behaviour(report, subject(report)),
        section_quality.prompts(report),
        section_quality.robustness(report, shown),
        section_experts.routing(report, shown),
        section_lost.lost_experts(report),
        section_experts.layers(report),
        section_tuned.finetune(report),
        conversion(report),
    ]
    return [section for section in parts if section]


def conversion(report: Mapping[str, Any]) -> Section:
    """The settings, the cost and the versions of the conversion, and what was not measured."""
    run = report["run"]
    calibration = run["calibration"]
    rows = [
        ("dense model", str(run["model"])),
        ("class", f"{run['reopened']['class']}: {run['target_reason']}"),
        ("shape", shape_text(run)),
        ("method", method_of(run["recipe"]) if "recipe" in run else "unknown"),
        (
            "calibration",
            f"{calibration['sequences']} sequences of {calibration['sequence_length']} tokens from "
            f"{calibration['source']}, the last {calibration['heldout_sequences']} held out",
        ),
        ("time", f"{fixed(run['seconds']['total'], 0)} s on {run['device']}"),
        ("peak memory", large(run["peak_resident_bytes"], "B")),
        ("versions", ", ".join(f"{name} {value}" for name, value in run["versions"].items())),
    ]
    rows += [
        ("note", str(note)) for note in (*run["notes"], *calibration["notes"], *report["notes"])
    ]
    tables = [Table("Settings and cost", ("what", "figure"), tuple(rows), on_terminal=False)]
    if report["not_run"]:
        missing = tuple((row["what"], row["reason"]) for row in report["not_run"])
        tables.append(Table("Not run", ("what", "why"), missing, on_terminal=False))
    return Section("conversion", "The conversion", tables=tuple(tables))


def title(report: Mapping[str, Any]) -> str:
    """The dense model and the class that it was converted to."""
    return f"{model_name(report['run'])} as {report['run']['reopened']['class']}"


def tiles(report: Mapping[str, Any]) -> list[Tile]:
    """The headline: size, perplexity and speed of the main model."""
    label = subject(report)
    if label is None:
        return []
    result = []
    model, dense = report["models"].get(label, {}), report["models"].get("dense", {})
    if model.get("parameters_active"):
        whole = dense.get("parameters_total")
        word = f"dense: {large(whole)}" if whole else ""
        result.append(Tile(large(model["parameters_active"]), "parameters active per token", word))
    for text, rows in list(report["texts"].items())[:2]:
        if label in rows and "dense" in rows:
            result.append(
                Tile(
                    fixed(rows[label]["perplexity"]),
                    f"perplexity on {text}",
                    f"dense: {fixed(rows['dense']['perplexity'])}",
                )
            )
    for engine, measured in report["speed"].items():
        rows = [
            row
            for row in measured["rows"]
            if row["label"] == label and row["phase"] == "decode" and row.get("ratio")
        ]
        if rows:
            row = min(rows, key=lambda row: (row["batch"], row.get("context") or 0))
            result.append(_speed_tile(engine, row))
    return result[:6]


def _speed_tile(engine: str, row: Mapping[str, Any]) -> Tile:
    """A speed is called faster or slower if it was so in every round, as in the advice."""
    ratio, name = row["ratio"], f"writing in {engine}, batch {row['batch']}"
    low, high = row.get("ratio_low", ratio), row.get("ratio_high", ratio)
    if ratio >= 1 + CLEAR and low > 1:
        return Tile(times(ratio), name, "faster than dense", True)
    if ratio <= 1 - CLEAR and high < 1:
        return Tile(times(ratio), name, "slower than dense", False)
    return Tile(times(ratio), name, f"no clear difference: {times(low)} to {times(high)}")


@dataclass(frozen=True)
class Verdict:
    """All advice of one verdict; each sentence is in two parts, the first of which stands out."""

    word: str
    sign: str
    sentences: tuple[tuple[str, str], ...]


def verdicts(report: Mapping[str, Any]) -> list[Verdict]:
    """The advice by verdict, in the order in which each first comes."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for advice in report["advice"]:
        groups.setdefault(str(advice["verdict"]), []).append(_halves(str(advice["sentence"])))
    return [
        Verdict(word, VERDICTS.get(word, "○"), tuple(sentences))
        for word, sentences in groups.items()
    ]


def _halves(sentence: str) -> tuple[str, str]:
    """What stands before the first colon or semicolon, and what follows.

    >>> _halves("SLOWER at batch 1: 0.74 times."), _halves("It costs 1.1 nats; that is a lot.")
    (('SLOWER at batch 1', ': 0.74 times.'), ('It costs 1.1 nats', '; that is a lot.'))
    """
    match = re.search(r"[:;] ", sentence)
    return (sentence[: match.start()], sentence[match.start() :]) if match else (sentence, "")
