"""What `moefy inspect` and `moefy families` print on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moefy.models.engines import by_reason
from moefy.report.terminal import show_table


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
