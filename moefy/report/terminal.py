"""What a person sees on the terminal when a command is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moefy.report.pages import SCORES, score_rows, seen_warnings, shape_text


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; columns but the first are right-aligned when they hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left")
    for number, name in enumerate(header):
        numeric = number > 0 and any(row[number][:1].isdigit() for row in rows)
        table.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def show_conversion(summary: Mapping[str, Any], out: Path) -> None:
    """Print what was made and where it lies."""
    console = Console(highlight=False, soft_wrap=True)
    layers = summary["layers"]
    before = sum(layer["error_before_refit"] for layer in layers) / len(layers)
    after = sum(layer["error_after_refit"] for layer in layers) / len(layers)
    console.print(f"{summary['reopened']['class']}, {shape_text(summary['shape'])}", markup=False)
    console.print(
        f"FFN output error on held-out calibration text: {before:.3f}, {after:.3f} after the "
        f"refit (mean over {len(layers)} layers)"
    )
    if "energy_router" in layers[0]:
        shares = {
            name: sum(layer[f"energy_{name}"] for layer in layers) / len(layers)
            for name in ("router", "oracle", "random", "static")
        }
        console.print(
            "Output energy kept: "
            + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
        )
    for note in [*summary["notes"], *summary["calibration"]["notes"]]:
        console.print(f"Note: {note}", markup=False)
    console.print(
        f"{summary['seconds']['total']:.0f} s, peak memory "
        f"{summary['peak_resident_bytes'] / 1e9:.1f} GB"
    )
    console.print(f"Model: {out}", markup=False)
    console.print(f"Report: {out / 'moefy' / 'conversion.md'}", markup=False)


def show_export(made: Mapping[str, Any]) -> None:
    """Print what file was made, of which type, and how large it is."""
    console = Console(highlight=False, soft_wrap=True)
    for note in made["notes"]:
        console.print(f"Note: {note}", markup=False)
    size = f"{made['bytes'] / 1e6:.1f} MB"
    console.print(f"{made['model_type']} as {made['type']}, {size}, {made['seconds']:.0f} s")
    console.print(f"File: {made['file']}", markup=False)


def show_report(report: Mapping[str, Any], run: Path) -> None:
    """Print the scores, a line of text from both models, and where the report lies."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(shape_text(report["run"]["shape"]), markup=False)
    for text, rows in report["texts"].items():
        tokens = next(iter(rows.values()))["tokens"]
        show_table(SCORES, score_rows(rows), f"{text}, {tokens} tokens")
    for warning in seen_warnings(report):
        console.print(f"Warning: {warning}", markup=False)
    for name, meaning in report["controls"].items():
        console.print(f"{name}: {meaning}", markup=False)
    written = report["generation"]
    console.print(f"\n{written['prompt']} ...", markup=False)
    console.print(f"  dense: {written['dense']}", markup=False)
    console.print(f"  moe:   {written['moe']}", markup=False)
    console.print(f"\nReport: {run / 'moefy' / 'report.md'}", markup=False)


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what a conversion would take and give."""
    rows = [
        ("model", f"{plan['model']} ({plan['family']})"),
        ("target", plan["target"]),
        ("FFN", shape_text(plan["shape"])),
        ("layers", f"{plan['layers_converted']} converted, {plan['layers_left_dense']} dense"),
        ("parameters, dense", f"{plan['parameters_dense'] / 1e6:,.1f} M"),
        ("parameters, total", f"{plan['parameters_total'] / 1e6:,.1f} M"),
        ("parameters, active", f"{plan['parameters_active'] / 1e6:,.1f} M"),
        ("GFLOPs per token, dense", f"{plan['flops_per_token_dense'] / 1e9:.3f}"),
        ("GFLOPs per token", f"{plan['flops_per_token'] / 1e9:.3f}"),
        ("disk", f"{plan['disk_bytes'] / 1e9:.2f} GB"),
        ("peak memory, about", f"{plan['memory_bytes'] / 1e9:.1f} GB"),
        ("time, about", f"{plan['seconds'] / 60:.1f} min"),
    ]
    rows += [("note", note) for note in plan["notes"]]
    table = Table(box=None, show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(soft_wrap=True).print(table)
