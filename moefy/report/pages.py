"""The pages in Markdown: of a conversion, and of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moefy.report.format import shape_text
from moefy.report.markdown import escaped, section, table
from moefy.report.sections import Verdict, sections, title, verdicts

COLUMNS = {
    "layer": ("layer", "d"),
    "energy_neurons": ("best neurons", ".3f"),
    "energy_oracle": ("oracle", ".3f"),
    "energy_router": ("router", ".3f"),
    "energy_random": ("by lot", ".3f"),
    "energy_static": ("static", ".3f"),
    "router_oracle_agreement": ("agreement", ".2f"),
    "error": ("error", ".3f"),
    "error_before_refit": ("error", ".3f"),
    "error_after_refit": ("refitted", ".3f"),
    "error_after_polish": ("polished", ".3f"),
    "load_cv": ("load CV", ".2f"),
    "least_tokens": ("least tokens", "d"),
    "seconds": ("s", ".1f"),
}


def _drops(order: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on the layers that were dropped because they cost least."""
    costs = ", ".join(f"{drop['layer']} ({drop['kl']:.3f})" for drop in order)
    return [f"Layers dropped, and the KL divergence that each left: {costs}."] * bool(order)


def conversion_page(summary: Mapping[str, Any]) -> str:
    """`moefy/conversion.md`: the settings of a conversion, and what each layer lost."""
    layers = summary["layers"]
    keys = [key for key in COLUMNS if layers and key in layers[0]]
    rows = [[format(layer[key], COLUMNS[key][1]) for key in keys] for layer in layers]
    calibration = summary["calibration"]
    notes = [*summary["notes"], *calibration["notes"]]
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    parts = [
        "# Conversion",
        f"`{summary['model']}` ({summary['family']}) to `{summary['target']}` by moefy "
        f"{summary['moefy']}. {shape_text(summary)}.",
        f"Why this class: {summary['target_reason']}.",
        f"Calibrated on {calibration['sequences']} sequences of {calibration['sequence_length']} "
        f"tokens from `{calibration['source']}`, of which the last "
        f"{calibration['heldout_sequences']} were held out. Every figure below is from those.",
        *_drops(summary.get("dropped", [])),
        f"Took {stages}; peak resident memory {summary['peak_resident_bytes'] / 1e9:.2f} GB.",
        f"Reopened with transformers as `{summary['reopened']['class']}` "
        f"({summary['reopened']['layers']} layers): relative difference of the last hidden states "
        f"{summary['reopened']['hidden_state_error']:.1e}.",
        *[f"Note: {note}." for note in notes],
        "## Layers",
        "Best neurons, oracle, router, by lot and static: the share of the dense FFN's output "
        "energy that stays when a token chooses its best neurons, its best experts, the router's "
        "experts, random experts, or the same neurons as all tokens. Agreement: how often router "
        "and oracle choose the same expert. Error: the relative output error before the refit. "
        "Load CV: the coefficient of variation of the experts' load. Least tokens: how many the "
        "least used expert was fitted on.",
        table([COLUMNS[key][0] for key in keys], rows),
    ]
    return "\n\n".join(parts) + "\n"


def report_page(report: Mapping[str, Any]) -> str:
    """`moefy/report.md`: the HTML page without its pictures."""
    parts = [f"# {escaped(title(report))}", f"{shape_text(report['run'])}."]
    parts += ["## Is it worth it?"] if report["advice"] else []
    parts += map(verdict, verdicts(report))
    parts += [section(part) for part in sections(report) if part.tables or part.voices]
    return "\n\n".join(parts) + "\n"


def verdict(verdict: Verdict) -> str:
    """All advice of one verdict, as a list under its name."""
    lines = "\n".join(f"- **{escaped(head)}**{escaped(rest)}" for head, rest in verdict.sentences)
    return f"### {verdict.sign} {escaped(verdict.word.capitalize())}\n\n{lines}"
