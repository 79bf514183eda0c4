"""What `moefy report` says on the terminal: numbers, whether it pays, and what was not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from moefy.report.draw import HTML
from moefy.report.format import computed_in, row_dtype, shape_text
from moefy.report.section_quality import SCORES, score_rows, seen_warnings
from moefy.report.terminal import show_conversion, show_finetune, show_table
from moefy.report.web import NO_PICTURES, can_draw

COLOURS = {"pays": "green", "does not pay": "bold red", "not measured": "yellow"}


def show_report(report: Mapping[str, Any], run: Path) -> None:
    """Print every part that was measured, the advice, what was not run, and where the pages lie."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(shape_text(report["run"]["shape"]), markup=False)
    for text, rows in report["texts"].items():
        tokens = next(iter(rows.values()))["tokens"]
        # A method that was asked for by its settings takes a line for each of them.
        named = {
            name.replace(" ", "\n") if "=" in name else name: row for name, row in rows.items()
        }
        show_table(SCORES, score_rows(named), f"{text}, {tokens} tokens{computed_in(report)}")
    if note := report.get("compute", {}).get("note"):
        console.print(f"Note: this report {note}", markup=False)
    for warning in seen_warnings(report):
        console.print(f"Warning: {warning}", markup=False)
    for header, rows, title in _tables(report):
        if rows:
            show_table(header, rows, title)
    for name, told in report["models"].items():
        if told["kind"] in ("control", "other"):
            console.print(f"{name}: {told['meaning']}", markup=False)
    for text in report["generation"][:1]:
        console.print(f"\n{text['prompt']} ...", markup=False)
        for label, written in text["written"].items():
            console.print(f"  {label}: {' '.join(written.split())}", markup=False)
    for number, one in enumerate(report["advice"]):
        console.print(Text(("\n" if not number else "") + one["sentence"], COLOURS[one["verdict"]]))
    for one in report["not_run"]:
        console.print(Text(f"Not run: {one['what']}: {one['reason']}", "yellow"))
    show_page(run)


def show_page(run: Path) -> None:
    """Print where the page of a report lies, and what it lacks."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\nReport: {run / HTML}", markup=False)
    if not can_draw():
        console.print(f"Note: {NO_PICTURES}", markup=False)


def show_run(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what every stage of a run came to."""
    shown = {"convert": show_conversion, "finetune": show_finetune, "report": show_report}
    for name, stage in stages.items():
        folder = Path(stage["folder"])
        print(f"{name}: {folder}" + (", done already" if stage["skipped"] else ""))
        if not stage["skipped"]:
            shown[name](stage["told"], folder)


Table = tuple[Sequence[str], list[tuple[str, ...]], str]


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    yield _sizes(report["models"])
    yield _routing(report["routing"])
    yield _robustness(report["robustness"], report["main"])
    yield _benchmarks(report["benchmarks"])
    yield _prompts(report["prompts"])
    for engine, told in report["speed"].items():
        yield _speed(engine, told)


def _sizes(models: Mapping[str, Any]) -> Table:
    header = ("model", "parameters", "active", "MFLOPs/token", "MB", "KV bytes/token", "peak MB")
    rows = [
        (
            label,
            f"{told['parameters_total'] / 1e6:,.1f} M",
            f"{told['parameters_active'] / 1e6:,.1f} M",
            f"{told['flops_per_token'] / 1e6:,.0f}",
            f"{told['weight_bytes'] / 1e6:,.0f}",
            f"{told['kv_bytes_per_token']:,}",
            f"{told['peak_bytes'] / 1e6:,.0f}" if told.get("peak_bytes") else "",
        )
        for label, told in models.items()
        if "parameters_total" in told
    ]
    return header, rows, "Size"


def _routing(routing: Mapping[str, Any]) -> Table:
    header = ("model", "load CV, mean", "largest", "entropy, mean", "smallest", "dead experts")
    rows = []
    for label, told in routing.items():
        layers = told["layers"]
        load_cv = [layer["load_cv"] for layer in layers]
        entropy = [layer["entropy"] for layer in layers]
        figures = [
            sum(load_cv) / len(layers),
            max(load_cv),
            sum(entropy) / len(layers),
            min(entropy),
        ]
        dead = sum(layer["dead"] for layer in layers)
        rows.append((label, *(f"{figure:.2f}" for figure in figures), str(dead)))
    return header, rows, "Routing, over all texts"


def _robustness(conditions: Mapping[str, Any], label: str) -> Table:
    header = ("condition", "perplexity", "dNLL", "KL", "routing entropy", "drift")
    rows = []
    for name, found in conditions.items():
        row = found.get(label)
        if row:
            routed = (row["routing_entropy"], row["routing_drift"])
            rows.append(
                (
                    name,
                    f"{row['perplexity']:,.2f}",
                    f"{row['dnll']:.3f}",
                    f"{row['kl']:.3f}",
                    *("" if value is None else f"{value:.2f}" for value in routed),
                )
            )
    return header, rows, f"Robustness of {label}"


def _benchmarks(benchmarks: Mapping[str, Any]) -> Table:
    header = ("task", "model", "metric", "value", "difference", "p")
    rows = []
    for task, by_label in benchmarks.items():
        for label, row in by_label.items():
            if "not_run" in row:
                rows.append((task, label, "not run", "", "", ""))
                continue
            error = row["standard_error"]
            value = f"{row['value']:.3f}" + ("" if error is None else f" ± {error:.3f}")
            paired = ("", "")
            if "difference" in row:
                paired = (f"{row['difference']:+.3f}", f"{row['p_value']:.3f}")
            rows.append((task, label, row["metric"], value, *paired))
    return header, rows, "Benchmarks"


def _prompts(prompts: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (_short(one["prompt"]), _short(one["answer"]), f"{one['drop']:.3f}")
        for one in prompts
        if one["flagged"]
    ]
    return ("prompt", "answer", "lost, nats/token"), rows, "Answers that became least likely"


def _speed(engine: str, told: Mapping[str, Any]) -> Table:
    header = ("work", "model", "dtype", "tokens/s", "times dense", "over rounds", "ideal")
    rows = []
    for row in told["rows"]:
        ideal = told["ideal_ratio"].get(row["label"], {}).get(row["phase"])
        ideal = ideal.get(str(row["batch"])) if isinstance(ideal, Mapping) else ideal
        dense = row["label"] == "dense"
        rows.append(
            (
                f"{row['phase']} {row['context']}, batch {row['batch']}",
                row["label"],
                row_dtype(told, row),
                f"{row['tokens_per_second']:.1f}",
                "" if dense else f"{row['ratio']:.2f}",
                "" if dense else f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
                "" if dense or ideal is None else f"{ideal:.2f}",
            )
        )
    threads = told["threads"]
    words = [f"Speed in {engine}", f"{threads} thread" + ("s" if threads > 1 else "")]
    return header, rows, ", ".join([*words, *filter(None, [told.get("processor")])])


def _short(text: str, most: int = 40) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
