"""`README.md` of a written model: what it is, how it is used, what it lost; for the Hub as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefy.report.citations import sources
from moefy.report.format import fixed, model_name, percent, shape_text, times, uncertain
from moefy.report.markdown import escaped, table
from moefy.report.pages import verdict
from moefy.report.sections import subject, verdicts

TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
"""The Hub's names of what a model is for, where it has one."""

PATH = "PATH"
"""Stands in the snippet for where the model is, until it has a place on the Hub."""


def model_card(
    run: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    place: str = PATH,
    trained: Mapping[str, Any] | None = None,
) -> str:
    """The card of the model whose conversion.json is `run`, with the numbers of `report` if any.

    `trained` is the finetune.json of one that was fine-tuned; a report holds it.
    """
    if report and subject(report) in report["finetune"]:
        trained = report["finetune"][subject(report)]["summary"]
    parts = [
        f"# {escaped(model_name(run))}, {run['shape']['active_fraction']:.0%} of the FFN active",
        _what(run, trained),
        _usage(run, place),
        *_numbers(run, report),
        *_made(run, trained),
        *_limits(run),
        *_licence(run),
        *_methods(run),
    ]
    return f"---\n{_metadata(run, report)}\n---\n\n" + "\n\n".join(parts) + "\n"


def _metadata(run: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    """The YAML head of the card, as the Hub reads it."""
    from huggingface_hub import ModelCardData

    inherited = run.get("licence") or {}
    results = _results(run, report)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASKS.get(run["task"]),
        base_model=run["hub_id"] or None,
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=inherited.get("license_link"),
        language=inherited.get("language"),
        tags=["moefy", *(["moe", "mixture-of-experts"] if run["shape"]["num_experts"] else [])],
        model_name=model_name(run) if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _results(run: Mapping[str, Any], report: Mapping[str, Any] | None) -> list[Any]:
    """The report's scores of the model, as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    label = subject(report) if report else None
    task = TASKS.get(run["task"], "text-generation")
    if not report or label is None:
        return []
    results = [
        EvalResult(task, text, text, "perplexity", round(rows[label]["perplexity"], 4))
        for text, rows in report["texts"].items()
        if label in rows
    ]
    results += [
        EvalResult(task, name, name, str(rows[label]["metric"]), round(rows[label]["value"], 4))
        for name, rows in report["benchmarks"].items()
        if rows.get(label, {}).get("value") is not None
    ]
    return results


def _what(run: Mapping[str, Any], trained: Mapping[str, Any] | None) -> str:
    kind = "a Mixture of Experts" if run["shape"]["num_experts"] else "a statically pruned model"
    how = f"and fine-tuned on {trained['tokens']:,} tokens" if trained else "without training"
    name = f"`{model_name(run)}`"
    if run["hub_id"]:
        name = f"[{name}](https://huggingface.co/{run['hub_id']})"
    return (
        f"This is {name} as {kind}, made by moefy {run['moefy']} {how}. {shape_text(run['shape'])}."
    )


def _usage(run: Mapping[str, Any], place: str) -> str:
    own = run["target"] == "moefy"
    auto = "AutoModel" + run["task"].removeprefix("Model")
    told = "It needs moefy, and runs in transformers only: " if own else "It is a stock "
    engines = [name for name in run["engines"] if name != "transformers"]
    others = f" {', '.join(engines)} know the class too." if engines and not own else ""
    return (
        f"## How to use it\n\n{told}`{run['reopened']['class']}`, no `trust_remote_code`.{others}"
        "\n\n"
        "```python\n"
        + ("import moefy.modeling\n" if own else "")
        + f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("{place}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}")\n```'
    )


def _numbers(run: Mapping[str, Any], report: Mapping[str, Any] | None) -> list[str]:
    """What was measured, or that nothing was yet."""
    label = subject(report) if report else None
    if not report or label is None:
        can = run["task"] == "ForCausalLM"
        told = "; `moefy report` measures how much on your text." if can else "."
        return [f"It has lost quality against the dense model{told}"]
    parts = ["## What it lost, and what it gained", *map(verdict, verdicts(report))]
    rows = [
        (
            text,
            fixed(found["dense"]["perplexity"]),
            fixed(found[label]["perplexity"]),
            uncertain(found[label].get("dnll"), found[label].get("dnll_standard_error")),
            fixed(found[label].get("kl"), 3),
            percent(found[label].get("top1_agreement")),
        )
        for text, found in report["texts"].items()
        if label in found and "dense" in found
    ]
    if rows:
        header = ("text", "dense perplexity", "perplexity", "dNLL", "KL", "same first choice")
        parts.append(table(header, rows))
    tasks = [
        (
            name,
            str(found[label]["metric"]),
            uncertain(found.get("dense", {}).get("value"), None),
            uncertain(found[label]["value"], found[label].get("standard_error")),
        )
        for name, found in report["benchmarks"].items()
        if found.get(label, {}).get("value") is not None
    ]
    if tasks:
        parts.append(table(("benchmark", "metric", "dense", "this model"), tasks))
    for engine, told in report["speed"].items():
        rows = [row for row in told["rows"] if row["label"] == label and row.get("ratio")]
        shortest = min((row.get("context") or 0 for row in rows), default=0)
        rows = [row for row in rows if (row.get("context") or 0) == shortest]
        batches = sorted({row["batch"] for row in rows})
        phases = dict.fromkeys(row["phase"] for row in rows)
        ratios = {(row["phase"], row["batch"]): times(row["ratio"]) for row in rows}
        if ratios:
            header = (f"speed in {engine}, relative to dense", *(f"batch {n}" for n in batches))
            cells = [(phase, *(ratios.get((phase, n), "") for n in batches)) for phase in phases]
            parts.append(table(header, cells))
    return [*parts, "All of it, with controls and pictures, is in `moefy/report.html`."]


def _made(run: Mapping[str, Any], trained: Mapping[str, Any] | None) -> list[str]:
    calibration = run["calibration"]
    told = (
        f"Calibrated on {calibration['sequences']} sequences of {calibration['sequence_length']} "
        f"tokens from {_file(calibration['source'])}. The recipe is `moefy/recipe.toml`, what each "
        "layer lost is in `moefy/conversion.md`."
    )
    if not trained:
        return ["## How it was made", told]
    before, after = (trained["validation"][when]["loss"] for when in ("before", "after"))
    tuned = (
        f"Then fine-tuned on {trained['tokens']:,} tokens of {_file(trained['train']['source'])}: "
        f"the loss on text that was kept apart went from {before:.3f} to {after:.3f} nats per "
        "token. Settings and figures are in `moefy/finetune.json`."
    )
    return ["## How it was made", told, tuned]


def _file(source: object) -> str:
    """The name of a text, without the folder that it lay in."""
    return f"`{str(source).replace(chr(92), '/').rstrip('/').rsplit('/', 1)[-1]}`"


def _limits(run: Mapping[str, Any]) -> list[str]:
    limits = [
        "What the dense model gets wrong, this one gets wrong as well, and more often.",
        "The experts were chosen on the calibration text: text unlike it loses more.",
    ]
    if run["shape"]["num_experts"]:
        limits.append(
            "All experts are kept in memory: it saves compute, not memory. Small models may run "
            "slower than the dense one."
        )
        limits.append("The weights were fitted for the number of experts per token that is set.")
    limits += [str(note) for note in run["notes"]]
    return ["## Limits", "\n".join(f"- {escaped(limit)}" for limit in limits)]


def _licence(run: Mapping[str, Any]) -> list[str]:
    inherited = run.get("licence") or {}
    name = inherited.get("license_name") or inherited.get("license")
    if not name:
        return ["## Licence", "That of the dense model, which named none that could be read."]
    link = inherited.get("license_link")
    told = f"[{escaped(name)}]({link})" if link else escaped(name)
    return ["## Licence", f"{told}, inherited from the dense model."]


def _methods(run: Mapping[str, Any]) -> list[str]:
    recipe = run.get("recipe")
    found = sources(recipe) if recipe else []
    if not found:
        return []
    return ["## Methods", "It builds on:\n\n" + "\n".join(f"- {work}" for work in found)]
