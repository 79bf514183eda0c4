"""How fine-tuning went."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moefy.report import figures
from moefy.report.chart import SERIES, Look
from moefy.report.document import Picture, Section, Table
from moefy.report.format import fixed, large

CURVES = (
    ("loss", "Loss", ("loss", "ce", "kl")),
    ("balance", "Balance while training", ("load_cv", "entropy")),
)
HUES = {"loss": "blue", "kl": "vermillion", "ce": "purple", "load_cv": "blue", "entropy": "green"}


def finetune(report: Mapping[str, Any]) -> Section:
    """How fine-tuning went."""
    pictures, tables = [], []
    for number, (label, tuning) in enumerate(report["finetune"].items()):
        curve = [row for row in tuning.get("curve") or [] if "validation" not in row]
        checks = [row for row in tuning.get("curve") or [] if row.get("validation")]
        for name, title, keys in CURVES:
            looks = {key: (key, Look(SERIES[HUES[key]], "o")) for key in keys}
            known = figures.curves(curve, "step", looks)
            if name == "loss":
                flat = [{**row["validation"], "step": row["step"]} for row in checks]
                held_out = {
                    key: (f"{key}, held out", Look(SERIES[HUES[key]], "D"))
                    for key in ("loss", "kl")
                }
                known += figures.curves(flat, "step", held_out, points=True)
            if known:
                alt = f"{title} of {label}. " + "; ".join(
                    f"{n.name}: {n.y[0]:.3f} at step {n.x[0]}, {n.y[-1]:.3f} at step {n.x[-1]}"
                    for n in known
                )
                draw = partial(figures.lines, known, x_axis="step", from_zero=True, height=3.6)
                pictures.append(
                    Picture(f"finetune-{number}-{name}", f"{title}: {label}", alt, draw)
                )
        tables += _trained(label, tuning["summary"])
    lead = ("Losses in nats per token. Points are measured on held-out text.",)
    return Section("finetune", "Fine-tuning", lead, tuple(pictures), tuple(tables))


def selected_text(chosen: Mapping[str, Any]) -> str:
    """Of which step the weights are, and why."""
    name = {"kl": "KL", "loss": "loss"}[chosen["by"]]
    text = f"of step {chosen['step']}, {name} {chosen['value']:.3f} on the validation text"
    last = chosen["value"] == chosen["last"]
    return f"{text}, the last" if last else f"{text}; {chosen['last']:.3f} at the last step"


def refit_text(refit: Mapping[str, Any]) -> str:
    """What a refit after the training would change, and whether it was kept."""
    name = {"kl": "KL", "loss": "loss"}[refit["by"]]
    text = f"{name} {refit['before']:.3f} to {refit['after']:.3f} on the validation text"
    return f"{text}, {'kept' if refit['kept'] else 'not kept'}"


def _trained(label: str, summary: Mapping[str, Any]) -> list[Table]:
    """The data, the steps and the result of a fine-tune."""
    rows = [
        ("text", str(summary["train"]["source"])),
        ("teacher", str(summary["teacher"]["model"])),
        ("tokens", large(summary.get("tokens"))),
        ("steps", str(summary.get("steps") or "")),
        ("minutes", fixed(summary["seconds"] / 60, 1) if summary.get("seconds") else ""),
    ]
    checks = summary.get("validation") or {}
    for key in checks.get("after") or {}:
        before, after = (checks.get(when, {}).get(key) for when in ("before", "after"))
        if isinstance(before, (int, float)) and isinstance(after, (int, float)):
            rows.append((f"held-out {key}", f"{before:.3f} to {after:.3f}"))
    if chosen := summary.get("selected"):
        rows.append(("weights", selected_text(chosen)))
    if refit := summary.get("refit"):
        rows.append(("refit after it", refit_text(refit)))
    rows += [
        (f"step {event.get('step')}", f"{event.get('reason')}: {event.get('action')}")
        for event in summary.get("guard") or []
    ]
    known = tuple(row for row in rows if row[1])
    table = Table(f"Fine-tuning of {label}", ("what", "figure"), known, on_terminal=False)
    return [table] if known else []
