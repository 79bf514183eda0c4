"""What a person sees on the terminal when a command is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moefy.models.engines import by_reason
from moefy.report.format import shape_text


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; columns but the first are right-aligned when they hold numbers."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title or None, title_justify="left", padding=(0, 1, 0, 0)
    )
    for number, name in enumerate(header):
        numeric = number > 0 and any(row[number][:1].isdigit() for row in rows)
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


def show_inspection(found: Mapping[str, Any]) -> None:
    """Print what a checkpoint is, and what can become of it or who runs it."""
    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _facts(found):
        facts.add_row(Text(name), Text(value))
    console.print(facts)
    if found.get("targets"):
        show_table(*_target_rows(found))
        for line in _target_notes(found):
            console.print(line, markup=False)
    if found.get("serving"):
        show_table(("engine", "runs it", "why, and what to heed"), _serving_rows(found["serving"]))


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is told of every checkpoint, and of experts if there are any."""
    sizes = {name: "?" if size is None else f"{size:,}" for name, size in found["sizes"].items()}
    classes = ", ".join(map(str, found["architectures"]))
    rows = [
        ("model", found["model"]),
        ("kind", f"{found['kind']}, {found['model_type']}" + (f" ({classes})" if classes else "")),
        ("sizes", f"{sizes['layers']} layers, hidden {sizes['hidden']}, FFN {sizes['ffn']}"),
        (
            "",
            f"{sizes['heads']} heads of {sizes['head_dim']}, {sizes['kv_heads']} for keys and "
            f"values, vocabulary {sizes['vocabulary']}",
        ),
    ]
    if not found["parameters"]:
        return rows
    active = ""
    if found["parameters_active"] != found["parameters"]:
        active = f", {found['parameters_active'] / 1e6:,.1f} M active per token"
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
    files = "1 file" if found["shards"] == 1 else f"{found['shards']} files"
    tied = ", the embedding is the head" if found.get("tied") else ""
    rows += [
        (
            "parameters",
            f"{found['parameters'] / 1e6:,.1f} M{active}; {found['ffn_share']:.0%} in FFNs",
        ),
        ("tensors", f"{kinds}; {found['disk_bytes'] / 1e6:,.0f} MB in {files}{tied}"),
    ]
    if experts := found.get("experts"):
        rows += _expert_facts(experts)
    return rows


def _expert_facts(experts: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = f"{experts['count']} routed, {experts['per_token']} per token"
    if experts["width"]:
        told += f", width {experts['width']:,}; shared {experts['shared_width']:,}"
        told += f"; {experts['active_fraction']:.1%} of the FFN active"
    dense = experts["dense_layers"]
    left = f", dense: {_ranges(dense)}" if dense else ""
    return [("experts", told), ("", f"in {experts['layers']} layers{left}")]


def _target_rows(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of targets: the shape for each `--active`, and aligned counts."""
    held = {name: target for name, target in found["targets"].items() if target["holds"]}
    stock = {name: target for name, target in held.items() if target["stock"]}
    shares = next((list(target["shapes"]) for target in held.values()), [])
    header = ("target", *(f"--active {share}" for share in shares), "experts n x 128 wide")
    rows = []
    for name, target in (stock or held).items():
        shapes = [_short(target["shapes"][share]) for share in shares]
        rows.append((name, *shapes, _ranges(map(int, target["widths"]["128"])) or "none"))
    return header, rows


def _target_notes(found: Mapping[str, Any]) -> list[str]:
    """Who runs which target, and why not all do."""
    lines: list[str] = []
    best: dict[str, list[str]] = {}
    for engine, names in found["engines"].items():
        if names:
            best.setdefault(names[0], []).append(engine)
    if best:
        lines.append("Engines: " + "; ".join(f"{', '.join(best[name])}: {name}" for name in best))
    else:
        missing = found["missing_feature"]
        reason = f"none has {missing}" if missing else "for the reasons below"
        lines.append(f"No stock class: {reason}. --target moefy runs in transformers only.")
    for name, target in found["targets"].items():
        if not target["holds"]:
            lines.append(f"Not {name}: {target['reason']}")
        issues = by_reason(target["engine_issues"])
        lines += [f"{name}: {engines} {reason}" for reason, engines in issues.items()]
    return lines


def _short(shape: Mapping[str, Any] | None) -> str:
    """A shape in few letters.

    >>> _short({"num_shared": 512, "num_experts": 8, "expert_width": 128, "experts_per_token": 2})
    '512 + 2 of 8x128'
    """
    if not shape:
        return "none"
    shared = f"{shape['num_shared']} + " if shape["num_shared"] else ""
    return f"{shared}{shape['experts_per_token']} of {shape['num_experts']}x{shape['expert_width']}"


def _serving_rows(serving: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    words = {True: "yes", False: "no", None: "unknown"}
    return [
        (engine, words[told["runs"]], "; ".join([*told["reasons"], *told["notes"]]))
        for engine, told in serving.items()
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in rising order, with runs of them drawn together.

    >>> _ranges([2, 3, 4, 6, 8, 9])
    '2-4, 6, 8, 9'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [[f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(text for part in parts for text in part)


def show_catalogue(known: Mapping[str, Any]) -> None:
    """Print the families with their targets, and what each target can express."""
    rows = [
        (name, ", ".join(told["targets"]) or f"no stock class has {told['missing_feature']}")
        for name, told in known["families"].items()
    ]
    show_table(("family", "classes that hold it, best first"), rows)
    rows = [
        (
            name,
            told["shared"],
            told["dense_layers"],
            "yes" if told["selection_bias"] else "no",
            "yes" if told["elastic"] else "no",
            ", ".join(name for name in told["engines"] if name != "transformers") or "none",
        )
        for name, told in known["targets"].items()
    ]
    header = "class, shared expert, dense layers, selection bias, elastic, other engines"
    show_table(header.split(", "), rows)
    Console().print("Every class runs in transformers.")


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
