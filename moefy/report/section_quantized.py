"""The run in fewer bits: how far from the dense model and from itself."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from moefy.report.document import Section, Table
from moefy.report.format import fixed, percent

HEADER = ("the run in llama.cpp's types", "MB", "KL to dense", "KL to the run", "same first choice")


def quantized(report: Mapping[str, Any]) -> Section:
    """Each type with its routers in 32 bits and in that type, over all texts and on each."""
    title, part = "What if it is quantised?", report["quantized"]
    if not part:
        return Section("quantized", title)
    caption = (
        f"{part['label']} ({report['run']['reopened']['class']}) in fewer bits, mean of the "
        f"texts, {part['tokens']:,} tokens, in float32"
    )
    tables = [Table(caption, HEADER, tuple(rows(report)))]
    texts = [row["text"] for row in part["rows"][0]["texts"]]
    if len(texts) > 1:
        tables += [
            Table(f"In fewer bits, on {text}", HEADER, tuple(rows(report, text)), True, False)
            for text in texts
        ]
    lead = (
        "Each matrix has the type that llama.cpp gives it and is rounded by its library. Routers, "
        "norms and biases stay in 32 bits, as in every file that moefy writes. The rows “routers, "
        "too” show what a program would cost that rounds routers like the rest. KL and first "
        "choice are against the dense model, and against the run in 32 bits.",
        *_routers(part["rows"]),
    )
    return Section("quantized", title, lead, (), tuple(tables))


def rows(report: Mapping[str, Any], text: str | None = None) -> list[tuple[str, ...]]:
    """The rows under `HEADER`: on a text, or the means of all."""
    result = []
    for row in report["quantized"].get("rows", ()):
        some = [one for one in row["texts"] if text in (None, one["text"])]
        size = row["weight_bytes"]
        result.append(
            (
                (row["type"] or "32 bits") + ", routers, too" * row["routers"],
                fixed(size and size / 1e6, 1),
                fixed(_mean(some, "kl_dense"), 4),
                fixed(_mean(some, "kl_run"), 4),
                percent(_mean(some, "top1_run")),
            )
        )
    return result


def _mean(rows: list[Mapping[str, Any]], key: str) -> float:
    return fmean(row[key] for row in rows)


def _routers(rows: list[Mapping[str, Any]]) -> tuple[str, ...]:
    """A sentence on what rounded routers change, type by type."""
    kl = {(row["type"], row["routers"]): _mean(row["texts"], "kl_run") for row in rows}
    changes = [
        f"from {kl[kind, False]:.4f} to {kl[kind, True]:.4f} in {kind}"
        for kind, routers in kl
        if routers
    ]
    return (f"With rounded routers the KL to the run goes {', '.join(changes)}.",)
