"""What a person sees on the terminal when a command is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moefy.config.recipe import method_of
from moefy.report.draw import HTML
from moefy.report.figures import short
from moefy.report.format import shape_text
from moefy.report.section_quality import meanings, seen_warnings
from moefy.report.sections import sections
from moefy.report.web import NO_PICTURES, can_draw

COLOURS = {"pays": "green", "does not pay": "bold red", "not measured": "yellow"}


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; columns but the first are right-aligned when they hold numbers."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(header):
        numeric = number > 0 and any(row[number].lstrip("+-< ")[:1].isdigit() for row in rows)
        justify = "right" if numeric else "left"
        table.add_column(name, justify=justify, no_wrap=number == 0)
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
    console.print(f"Method: {method_of(summary['recipe'])}", markup=False)
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


def show_push(told: Mapping[str, Any]) -> None:
    """Print what was sent to the Hub, or would be, and what was left out."""
    console = Console(highlight=False, soft_wrap=True)
    for name, size in told["files"].items():
        console.print(f"  {size:>14,}  {name}", markup=False)
    # Of a folder that holds many files, its name: none of them was meant.
    left = dict.fromkeys("/".join(name.split("/")[:2]) for name in told["left_out"])
    if left:
        console.print(f"Left out: {', '.join(left)}", markup=False)
    done = f"{len(told['files'])} files, {told['bytes'] / 1e6:,.1f} MB"
    where = told["repo"] + (f", branch {told['revision']}" if told["revision"] else "")
    sent = f"Sent to {told['url']}" if told["url"] else f"Would be sent to {where}"
    console.print(f"{sent}: {done}", markup=False)


def show_checks(found: Mapping[str, Any]) -> None:
    """Print what `moefy verify` has checked, a line each."""
    console = Console(highlight=False, soft_wrap=True)
    for check in found["checks"]:
        verdict = "ok" if check["passed"] else "FAILED"
        console.print(f"{verdict:7} {check['check']:13} {check['found']}", markup=False)
    for name in found["not_run"]:
        console.print(f"not run {name}", markup=False)


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what a conversion would take and give."""
    until = plan["state_bytes"] + plan["file_bytes"]
    rows = [
        ("model", f"{plan['model']} ({plan['family']})"),
        ("target", plan["target"]),
        ("FFN", shape_text(plan["shape"])),
        ("method", plan["method"]),
        ("layers", f"{plan['layers_converted']} converted, {plan['layers_left_dense']} dense"),
        ("parameters, dense", f"{plan['parameters_dense'] / 1e6:,.1f} M"),
        ("parameters, total", f"{plan['parameters_total'] / 1e6:,.1f} M"),
        ("parameters, active", f"{plan['parameters_active'] / 1e6:,.1f} M"),
        ("GFLOPs per token, dense", f"{plan['flops_per_token_dense'] / 1e9:.3f}"),
        ("GFLOPs per token", f"{plan['flops_per_token'] / 1e9:.3f}"),
        ("disk", f"{plan['disk_bytes'] / 1e9:.2f} GB"),
        ("disk until it is whole", f"{until / 1e9:.2f} GB more, to go on if it is stopped"),
        ("peak memory, about", f"{plan['memory_bytes'] / 1e9:.1f} GB ({plan['memory_stage']})"),
        ("time, about", f"{plan['seconds'] / 60:.1f} min"),
    ]
    rows += [("note", note) for note in plan["notes"]]
    table = Table(box=None, show_header=False)
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    Console(soft_wrap=True).print(table)


def show_finetune(summary: Mapping[str, Any], out: Path) -> None:
    """Print what a fine-tune did and where the result lies."""
    console = Console(highlight=False, soft_wrap=True)
    before, after = summary["validation"]["before"], summary["validation"]["after"]
    console.print(
        f"{summary['tokens']:,} tokens in {summary['steps']} steps, {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_second']:.0f} tokens/s"
    )
    told = {"loss": "loss", "kl": "KL to the teacher", "load_cv": "load CV", "dead": "dead experts"}
    rows = [
        [name, f"{before[key]:.3g}" if key == "dead" else f"{before[key]:.3f}"]
        + [f"{after[key]:.3g}" if key == "dead" else f"{after[key]:.3f}"]
        for key, name in told.items()
        if key in before
    ]
    show_table(["on text kept apart", "before", "after"], rows)
    for line in (summary.get("compute") or {}).get("notes", ()):
        console.print(f"Note: {line}", markup=False)
    for event in summary["guard"]:
        console.print(
            f"Guard, step {event['step']}: {event['reason']}; {event['action']}", markup=False
        )
    console.print(f"Model: {out}", markup=False)
    console.print(f"Report: {out / 'moefy' / 'finetune.json'}", markup=False)


def show_report(report: Mapping[str, Any], run: Path) -> None:
    """Print the tables of a report, the advice, what was not run, and where the page is."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(shape_text(report["run"]["shape"]), markup=False)
    parts = sections(report)
    for table in (table for part in parts for table in part.tables if table.on_terminal):
        rows = [(_row_name(name), *cells) for name, *cells in table.rows]
        show_table(table.header, rows, table.caption)
    if note := report.get("compute", {}).get("note"):
        console.print(f"Note: this report {note}", markup=False)
    for warning in seen_warnings(report):
        console.print(f"Warning: {warning}", markup=False)
    for meaning in meanings(report):
        console.print(meaning, markup=False)
    for sample in [sample for part in parts for sample in part.voices][:1]:
        console.print(f"\n{sample.prompt} ...", markup=False)
        for label, text in sample.answers:
            console.print(f"  {label}: {' '.join(text.split())}", markup=False)
    for number, advice in enumerate(report["advice"]):
        console.print(
            Text(("" if number else "\n") + advice["sentence"], COLOURS[advice["verdict"]])
        )
    for part in report["not_run"]:
        console.print(Text(f"Not run: {part['what']}: {part['reason']}", "yellow"))
    show_page(run)


def _row_name(name: str) -> str:
    """A row's name, short enough for a terminal: a method with its settings gets several lines."""
    return name.replace(" ", "\n") if "=" in name else short(name, 44)


def show_page(run: Path) -> None:
    """Print where the page of a report is, and what it lacks."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\nReport: {run / HTML}", markup=False)
    if not can_draw():
        console.print(f"Note: {NO_PICTURES}", markup=False)


def show_run(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the result of every stage of a run."""
    show = {"convert": show_conversion, "finetune": show_finetune, "report": show_report}
    for name, stage in stages.items():
        folder = Path(stage["folder"])
        print(f"{name}: {folder}" + (", done already" if stage["skipped"] else ""))
        if not stage["skipped"]:
            show[name](stage["told"], folder)
