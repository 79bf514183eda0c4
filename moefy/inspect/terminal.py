"""What `moefy inspect` and `moefy families` print on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moefy.models.engines import by_reason
from moefy.report.terminal import show_table


def show_inspection(facts: Mapping[str, Any]) -> None:
    """Print the facts of a checkpoint, and its possible targets or the engines that run it."""
    console = Console(highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in _facts(facts):
        table.add_row(Text(name), Text(value))
    console.print(table)
    if facts.get("targets"):
        show_table(*_target_rows(facts))
        for line in _target_notes(facts):
            console.print(line, markup=False)
    if facts.get("serving"):
        show_table(("engine", "runs it", "reasons and notes"), _serving_rows(facts["serving"]))


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of every checkpoint, and of its experts if it has some."""
    sizes = {name: "?" if size is None else f"{size:,}" for name, size in facts["sizes"].items()}
    classes = ", ".join(map(str, facts["architectures"]))
    rows = [
        ("model", facts["model"]),
        ("kind", f"{facts['kind']}, {facts['model_type']}" + (f" ({classes})" if classes else "")),
        ("sizes", f"{sizes['layers']} layers, hidden {sizes['hidden']}, FFN {sizes['ffn']}"),
        (
            "",
            f"{sizes['heads']} heads of {sizes['head_dim']}, {sizes['kv_heads']} for keys and "
            f"values, vocabulary {sizes['vocabulary']}",
        ),
    ]
    if not facts["parameters"]:
        return rows
    active = ""
    if facts["parameters_active"] != facts["parameters"]:
        active = f", {facts['parameters_active'] / 1e6:,.1f} M active per token"
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in facts["dtypes"].items())
    files = "1 file" if facts["shards"] == 1 else f"{facts['shards']} files"
    tied = ", the embedding is the head" if facts.get("tied") else ""
    rows += [
        (
            "parameters",
            f"{facts['parameters'] / 1e6:,.1f} M{active}; {facts['ffn_share']:.0%} in FFNs",
        ),
        ("tensors", f"{kinds}; {facts['disk_bytes'] / 1e6:,.0f} MB in {files}{tied}"),
    ]
    if floor := facts.get("floor"):
        least = f"{floor['parameters'] / 1e6:,.1f} M ({floor['share']:.0%}) whatever is --active"
        rows.append(("floor", f"{least}; {floor['layer'] / 1e6:,.1f} M less per dropped layer"))
    if experts := facts.get("experts"):
        rows += _expert_facts(experts)
    return rows


def _expert_facts(experts: Mapping[str, Any]) -> list[tuple[str, str]]:
    counts = f"{experts['count']} routed, {experts['per_token']} per token"
    if experts["width"]:
        counts += f", width {experts['width']:,}; shared {experts['shared_width']:,}"
        counts += f"; {experts['active_fraction']:.1%} of the FFN active"
    if experts["copies"]:
        counts += f"; {experts['copies']} copies of the dense FFN"
    dense = experts["dense_layers"]
    left = f", dense: {_ranges(dense)}" if dense else ""
    return [("experts", counts), ("", f"in {experts['layers']} layers{left}")]


def _target_rows(facts: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows of the table of targets: the shape for each `--active`, and aligned counts."""
    held = {name: target for name, target in facts["targets"].items() if target["holds"]}
    stock = {name: target for name, target in held.items() if target["stock"]}
    shares = next((list(target["shapes"]) for target in held.values()), [])
    header = ("target", *(f"--active {share}" for share in shares), "experts n x 128 wide")
    rows = []
    for name, target in (stock or held).items():
        shapes = [_short(target["shapes"][share]) for share in shares]
        rows.append((name, *shapes, _ranges(map(int, target["widths"]["128"])) or "none"))
    return header, rows


def _target_notes(facts: Mapping[str, Any]) -> list[str]:
    """Which engines run which target, and why others do not."""
    lines: list[str] = []
    best: dict[str, list[str]] = {}
    for engine, names in facts["engines"].items():
        if names:
            best.setdefault(names[0], []).append(engine)
    if best:
        lines.append("Engines: " + "; ".join(f"{', '.join(best[name])}: {name}" for name in best))
    else:
        missing = facts["missing_feature"]
        reason = f"none has {missing}" if missing else "for the reasons below"
        lines.append(f"No stock class: {reason}. --target moefy runs in transformers only.")
    for name, target in facts["targets"].items():
        if not target["holds"]:
            lines.append(f"Not {name}: {target['reason']}")
        issues = by_reason(target["engine_issues"])
        lines += [f"{name}: {engines} {reason}" for reason, engines in issues.items()]
    return lines


def _short(shape: Mapping[str, Any] | None) -> str:
    """A shape in short form.

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
        (engine, words[verdict["runs"]], "; ".join([*verdict["reasons"], *verdict["notes"]]))
        for engine, verdict in serving.items()
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """Rising numbers, with runs of them as ranges.

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
        (name, ", ".join(family["targets"]) or f"no stock class has {family['missing_feature']}")
        for name, family in known["families"].items()
    ]
    show_table(("family", "classes that hold it, best first"), rows)
    rows = [
        (
            name,
            target["shared"],
            target["dense_layers"],
            *("yes" if target[key] else "no" for key in ("selection_bias", "elastic", "copies")),
            ", ".join(name for name in target["engines"] if name != "transformers") or "none",
        )
        for name, target in known["targets"].items()
    ]
    header = "class, shared expert, dense layers, selection bias, elastic, copies, other engines"
    show_table(header.split(", "), rows)
    Console().print("Every class runs in transformers.")
