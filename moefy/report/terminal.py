"""What a person sees on the terminal when a command is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from moefy.report.html import NO_PICTURES, can_draw
from moefy.report.section_quality import meanings, seen_warnings
from moefy.report.section_tuned import refit_text, selected_text
from moefy.report.sections import sections

COLOURS = {"pays": "green", "does not pay": "bold red", "not measured": "yellow"}


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; columns but the first are right-aligned when they hold numbers."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(header):
        numeric = number > 0 and any(row[number].lstrip("+-< ")[:1].isdigit() for row in rows)
        justify = "right" if numeric else "left"
        widest = max(map(len, name.split()), default=0)  # or a narrow terminal cuts a word
        table.add_column(name, justify=justify, no_wrap=number == 0, min_width=widest)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def show_lines(*lines: str | Text) -> None:
    """Print lines as they are, however wide the terminal is."""
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, markup=False)


def show_conversion(summary: Mapping[str, Any], out: Path) -> None:
    """Print the class, the shape and the errors of a conversion, and where the model is."""
    layers = summary["layers"]

    def mean(key: str) -> str:
        return f"{sum(layer[key] for layer in layers) / len(layers):.3f}"

    lines = [
        f"{summary['reopened']['class']}, {shape_text(summary)}",
        f"Method: {method_of(summary['recipe'])}",
        _errors(layers, mean),
    ]
    if "energy_router" in layers[0]:
        names = ("router", "oracle", "random", "static")
        shares = ", ".join(f"{name} {mean(f'energy_{name}')}" for name in names)
        lines.append(f"Output energy kept: {shares}")
    lines += [f"Note: {note}" for note in (*summary["notes"], *summary["calibration"]["notes"])]
    memory = f"{summary['peak_resident_bytes'] / 1e9:.1f} GB"
    lines.append(f"{summary['seconds']['total']:.0f} s, peak memory {memory}")
    show_lines(*lines, f"Model: {out}", f"Report: {out / 'moefy' / 'conversion.md'}")


def _errors(layers: Sequence[Mapping[str, Any]], mean: Callable[[str], str]) -> str:
    """The errors of the layers in a line; of copies there is no refit."""
    where, of = "FFN output error on held-out calibration text", f"mean over {len(layers)} layers"
    if "error" in layers[0]:
        return f"{where}: {mean('error')}; load CV of the copies: {mean('load_cv')} ({of})"
    refitted = f"{mean('error_before_refit')}, {mean('error_after_refit')} after the refit"
    if "error_after_polish" in layers[0]:
        refitted += f", {mean('error_after_polish')} after the polish"
    return f"{where}: {refitted} ({of})"


def show_export(result: Mapping[str, Any]) -> None:
    """Print the type, the size and the place of a GGUF file."""
    size = f"{result['bytes'] / 1e6:.1f} MB"
    show_lines(
        *(f"Note: {note}" for note in result["notes"]),
        f"{result['model_type']} as {result['type']}, {size}, {result['seconds']:.0f} s",
        f"File: {result['file']}",
    )


def show_push(result: Mapping[str, Any]) -> None:
    """Print which files an upload sends, and which it leaves out."""
    lines = [f"  {size:>14,}  {name}" for name, size in result["files"].items()]
    # A folder stands for its files, which may be many.
    left_out = dict.fromkeys("/".join(name.split("/")[:2]) for name in result["left_out"])
    if left_out:
        lines.append(f"Left out: {', '.join(left_out)}")
    amount = f"{len(result['files'])} files, {result['bytes'] / 1e6:,.1f} MB"
    branch = f", branch {result['revision']}" if result["revision"] else ""
    where = f"Would be sent to {result['repo']}{branch}"
    if result["url"]:
        where = f"Sent to {result['url']}"
    show_lines(*lines, f"{where}: {amount}")


def show_checks(result: Mapping[str, Any]) -> None:
    """Print the checks of `moefy verify`, a line each."""
    for check in result["checks"]:
        verdict = "ok" if check["passed"] else "FAILED"
        show_lines(f"{verdict:7} {check['check']:13} {check['found']}")
    show_lines(*(f"not run {name}" for name in result["not_run"]))


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print the size, the cost and the memory of a conversion that has not run."""
    until = plan["state_bytes"] + plan["file_bytes"]
    rows = [
        ("model", f"{plan['model']} ({plan['family']})"),
        ("target", plan["target"]),
        ("FFN", shape_text(plan)),
        ("method", plan["method"]),
        (
            "layers",
            f"{plan['layers_converted']} converted, {plan['layers_left_dense']} dense"
            + f", {plan['layers_dropped']} dropped" * bool(plan["layers_dropped"]),
        ),
        ("parameters, dense", f"{plan['parameters_dense'] / 1e6:,.1f} M"),
        ("parameters, total", f"{plan['parameters_total'] / 1e6:,.1f} M"),
        (
            "parameters, active",
            f"{plan['parameters_active'] / 1e6:,.1f} M"
            + f"; {plan['parameters_floor'] / 1e6:,.1f} M whatever is --active"
            * (not plan["shape"]["granularity"]),
        ),
        ("GFLOPs per token, dense", f"{plan['flops_per_token_dense'] / 1e9:.3f}"),
        ("GFLOPs per token", f"{plan['flops_per_token'] / 1e9:.3f}"),
        ("disk", f"{plan['disk_bytes'] / 1e9:.2f} GB"),
        ("disk while it runs", f"{until / 1e9:.2f} GB more, to resume after a stop"),
        ("peak memory, about", f"{plan['memory_bytes'] / 1e9:.1f} GB ({plan['memory_stage']})"),
        ("calibration tokens", f"{plan['tokens']:,}"),
        ("time, about", f"{plan['seconds'] / 60:.1f} min"),
    ]
    if plan["device_bytes"]:
        rows.append(("memory of the GPU, about", f"{plan['device_bytes'] / 1e9:.1f} GB"))
    _show_rows(rows, plan["notes"])


def show_finetune_plan(plan: Mapping[str, Any]) -> None:
    """Print the tokens, the time, the memory and the disk of a fine-tune that has not run."""
    settings, gigabytes = plan["settings"], "{:.1f} GB".format
    given = [settings[f"{part}learning_rate"] for part in ("", "router_", "rest_")]
    by_size = "by size" + (f" x {factor:g}" if (factor := settings["rate_factor"]) != 1 else "")
    rates = (by_size if rate is None else f"{rate:.1e}" for rate in given)
    rows = [
        ("run", plan["run"]),
        ("text", ", ".join(plan["text"])),
        ("trained", f"{plan['train']}, {plan['parameters_trained'] / 1e6:,.1f} M parameters"),
        ("losses", f"KL {settings['kl']}, cross-entropy {settings['ce']}"),
        ("learning rates", "{} experts, {} routers, {} rest".format(*rates)),
        ("tokens", f"{plan['tokens']:,} in {plan['steps']:,} steps of {plan['tokens_per_step']:,}"),
        ("disk", gigabytes(plan["disk_bytes"] / 1e9)),
        ("disk while it runs", f"{plan['state_bytes'] / 1e9:.1f} GB more, to resume after a stop"),
        (
            "peak memory, about",
            f"{gigabytes(plan['memory_bytes'] / 1e9)} ({plan['memory_stage']})",
        ),
    ]
    if plan["gpu_memory_bytes"]:
        rows.append(("of the GPU, about", gigabytes(plan["gpu_memory_bytes"] / 1e9)))
    speed = f"{plan['tokens_per_second']:,.0f} tokens/s"
    rows.append(("time, about", f"{plan['seconds'] / 60:,.1f} min, {speed}"))
    _show_rows(rows, plan["notes"])


def _show_rows(rows: Sequence[tuple[str, str]], notes: Sequence[str]) -> None:
    table = Table(box=None, show_header=False)
    for name, value in [*rows, *(("note", note) for note in notes)]:
        table.add_row(Text(name), Text(value))
    Console(soft_wrap=True).print(table)


def show_finetune(summary: Mapping[str, Any], out: Path) -> None:
    """Print the losses of a fine-tune, its notes, and where the model is."""
    show_lines(
        f"{summary['tokens']:,} tokens in {summary['steps']} steps, {summary['seconds']:.0f} s, "
        f"{summary['tokens_per_second']:.0f} tokens/s"
    )
    checks = [summary["validation"][when] for when in ("before", "after")]
    names = {
        "loss": "loss",
        "kl": "KL to the teacher",
        "load_cv": "load CV",
        "dead": "dead experts",
        **{key: key for key in checks[0] if ", " in key},  # of each source of a mix
    }
    rows = [
        [name, *(f"{check[key]:.3g}" if key == "dead" else f"{check[key]:.3f}" for check in checks)]
        for key, name in names.items()
        if key in checks[0]
    ]
    show_table(["on held-out text", "before", "after"], rows)
    show_lines(
        *(f"Note: {note}" for note in summary["train"]["notes"]),
        *(f"Note: {note}" for note in (summary.get("compute") or {}).get("notes", ())),
        *([f"Weights: {selected_text(chosen)}"] if (chosen := summary.get("selected")) else []),
        *([f"Refit after it: {refit_text(refit)}"] if (refit := summary.get("refit")) else []),
        *(f"Guard, step {e['step']}: {e['reason']}; {e['action']}" for e in summary["guard"]),
        f"Model: {out}",
        f"Report: {out / 'moefy' / 'finetune.json'}",
    )


def show_report(report: Mapping[str, Any], run: Path) -> None:
    """Print the tables of a report, the advice, what was not run, and where the page is."""
    show_lines(shape_text(report["run"]))
    parts = sections(report)
    for table in (table for part in parts for table in part.tables if table.on_terminal):
        rows = [(_row_name(name), *cells) for name, *cells in table.rows]
        show_table(table.header, rows, table.caption)
    note = report.get("compute", {}).get("note")
    show_lines(
        *([f"Note: this report {note}"] if note else []),
        *(f"Warning: {warning}" for warning in seen_warnings(report)),
        *meanings(report),
    )
    for sample in [sample for part in parts for sample in part.voices][:1]:
        answers = (f"  {label}: {' '.join(text.split())}" for label, text in sample.answers)
        show_lines(f"\n{sample.prompt} ...", *answers)
    advice = [Text(one["sentence"], COLOURS[one["verdict"]]) for one in report["advice"]]
    missing = (f"Not run: {part['what']}: {part['reason']}" for part in report["not_run"])
    show_lines(*([""] if advice else []), *advice, *(Text(line, "yellow") for line in missing))
    show_page(run)


def _row_name(name: str) -> str:
    """A row's name, short enough for a terminal: a method with its settings gets several lines."""
    return name.replace(" ", "\n") if "=" in name else short(name, 44)


def show_page(run: Path) -> None:
    """Print where the page of a report is, and what it lacks."""
    show_lines(f"\nReport: {run / HTML}", *([] if can_draw() else [f"Note: {NO_PICTURES}"]))


def show_run(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the result of every stage of a run."""
    show = {"convert": show_conversion, "finetune": show_finetune, "report": show_report}
    for name, stage in stages.items():
        folder = Path(stage["folder"])
        print(f"{name}: {folder}" + (", done already" if stage["skipped"] else ""))
        if not stage["skipped"]:
            show[name](stage["told"], folder)
