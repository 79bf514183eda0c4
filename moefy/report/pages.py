"""The pages in Markdown: of a conversion, and of a report."""

from __future__ import annotations

from collections.abc import Mapping
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
    "error_before_refit": ("error", ".3f"),
    "error_after_refit": ("refitted", ".3f"),
    "load_cv": ("load CV", ".2f"),
    "least_tokens": ("least tokens", "d"),
    "seconds": ("s", ".1f"),
}


def conversion_page(summary: Mapping[str, Any]) -> str:
    """`moefy/conversion.md`: what was made, how, and what each layer lost."""
    layers = summary["layers"]
    keys = [key for key in COLUMNS if layers and key in layers[0]]
    rows = [[format(layer[key], COLUMNS[key][1]) for key in keys] for layer in layers]
    calibration = summary["calibration"]
    notes = [*summary["notes"], *calibration["notes"]]
    stages = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    parts = [
        "# Conversion",
        f"`{summary['model']}` ({summary['family']}) to `{summary['target']}` by moefy "
        f"{summary['moefy']}. {shape_text(summary['shape'])}.",
        f"Why this class: {summary['target_reason']}.",
        f"Calibrated on {calibration['sequences']} sequences of {calibration['sequence_length']} "
        f"tokens from `{calibration['source']}`, of which the last "
        f"{calibration['heldout_sequences']} were held out; every figure below is from those.",
        f"Took {stages}; peak resident memory {summary['peak_resident_bytes'] / 1e9:.2f} GB.",
        f"Reopened with transformers as `{summary['reopened']['class']}` "
        f"({summary['reopened']['layers']} layers): relative difference of the last hidden states "
        f"{summary['reopened']['hidden_state_error']:.1e}.",
        *[f"Note: {note}." for note in notes],
        "## Layers",
        "Share of the dense FFN's output energy that stays when a token may choose its own best "
        "neurons, the best experts (oracle), the router's experts, experts by lot, or has the same "
        "neurons as all others (static); how often router and oracle agree; relative output error "
        "before and after the refit; coefficient of variation of the experts' load; the tokens "
        "that the expert with the fewest was fitted on.",
        table([COLUMNS[key][0] for key in keys], rows),
    ]
    return "\n\n".join(parts) + "\n"


def report_page(report: Mapping[str, Any]) -> str:
    """`moefy/report.md`: the same as the HTML page, without its pictures."""
    parts = [f"# {escaped(title(report))}", f"{shape_text(report['run']['shape'])}."]
    parts += ["## Is it worth it?"] if report["advice"] else []
    parts += [verdict(told) for told in verdicts(report)]
    parts += [section(told) for told in sections(report) if told.tables or told.voices]
    return "\n\n".join(parts) + "\n"


def verdict(told: Verdict) -> str:
    """All advice of one verdict, as a list under its name."""
    said = "\n".join(f"- **{escaped(head)}**{escaped(rest)}" for head, rest in told.said)
    return f"### {told.sign} {escaped(told.word.capitalize())}\n\n{said}"
