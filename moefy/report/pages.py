"""The conversion page and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|")
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def shape_text(shape: Mapping[str, Any]) -> str:
    """One line on how each FFN is divided."""
    if not shape["num_experts"]:
        return f"{shape['num_shared']} of {shape['num_neurons']} FFN neurons kept"
    return (
        f"{shape['num_neurons']} neurons = {shape['num_shared']} shared + {shape['num_experts']} "
        f"experts x {shape['expert_width']}, {shape['experts_per_token']} experts per token: "
        f"{shape['active_fraction']:.1%} of the FFN active"
    )


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


def model_card(summary: Mapping[str, Any], licence: str | None) -> str:
    """`README.md` of the written model, with Hub metadata."""
    base = summary["model"]
    head = ["---", "library_name: transformers", "tags:", "- moefy", "- moe"]
    head += [f"base_model: {base}"] if summary["hub_id"] else []
    head += [f"license: {licence}"] if licence else []
    static = not summary["shape"]["num_experts"]
    own = summary["target"] == "moefy"
    kind = "a statically pruned model" if static else "a Mixture of Experts"
    auto = "AutoModel" + summary["task"].removeprefix("Model")
    name = summary["hub_id"] or base.rstrip("/").rsplit("/", 1)[-1]
    body = [
        f"# {name}, {summary['shape']['active_fraction']:.0%} of the FFN active",
        f"This is `{base}` as {kind}, made by moefy {summary['moefy']} without training. "
        f"{shape_text(summary['shape'])}. "
        + ("It needs moefy, and runs in transformers only: " if own else "It is a stock ")
        + f"`{summary['reopened']['class']}`:",
        "```python\n"
        + ("import moefy\n" if own else "")
        + f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("PATH", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```',
        "How it was made is in `moefy/recipe.toml`, what each layer lost in "
        "`moefy/conversion.md`. It has lost quality against the dense model"
        + ("; `moefy report` measures how much on your text." if "Causal" in auto else "."),
    ]
    return "\n".join([*head, "---", ""]) + "\n" + "\n\n".join(body) + "\n"


def report_page(report: Mapping[str, Any]) -> str:
    """`moefy/report.md`: the run beside the dense model and the controls."""
    parts = ["# Report", shape_text(report["run"]["shape"]) + "."]
    for text, rows in report["texts"].items():
        tokens = next(iter(rows.values()))["tokens"]
        parts += [f"## {text}, {tokens} tokens", table(SCORES, score_rows(rows))]
    parts += [f"Warning: {warning}." for warning in seen_warnings(report)]
    parts += [f"{name}: {told['meaning']}." for name, told in report["models"].items()]
    for text in report["generation"]:
        parts += [f"## After `{text['prompt']!r}`"]
        parts += [f"{label}: {written!r}" for label, written in text["written"].items()]
    if report["advice"]:
        parts += ["## Does it pay?"]
        parts += ["\n".join(f"- {one['sentence']}" for one in report["advice"])]
    if report["not_run"]:
        parts += ["## Not run"]
        parts += ["\n".join(f"- {one['what']}: {one['reason']}" for one in report["not_run"])]
    return "\n\n".join(parts) + "\n"


def seen_warnings(report: Mapping[str, Any]) -> list[str]:
    """Texts that calibration has seen, whose scores are therefore too good."""
    return [
        f"{share:.0%} of {text} stands word for word in the calibration text"
        for text, share in report["seen_in_calibration"].items()
        if share > 0.01
    ]


SCORES = ("model", "perplexity", "dNLL", "KL to dense", "top-1 as dense")


def score_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One line per model, formatted; dNLL = ln(perplexity / dense perplexity)."""
    return [
        (
            name,
            f"{row['perplexity']:.2f}",
            "" if name == "dense" else f"{row['dnll']:.3f}" + _uncertainty(row),
            "" if name == "dense" else f"{row['kl']:.3f}",
            "" if name == "dense" else f"{row['top1_agreement']:.1%}",
        )
        for name, row in rows.items()
    ]


def _uncertainty(row: Mapping[str, Any]) -> str:
    """The standard error, which one window alone does not give."""
    error = row["dnll_standard_error"]
    return "" if error is None else f" ± {error:.3f}"
