"""The model card, `README.md`: what the model is, how to use it, and what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moefy.models.targets import OWN
from moefy.report import section_behaviour, section_frontier, section_lost, section_quantized
from moefy.report.citations import sources
from moefy.report.format import (
    active_share,
    fixed,
    model_name,
    percent,
    ranged,
    shape_text,
    times,
    uncertain,
)
from moefy.report.markdown import escaped, table
from moefy.report.pages import verdict
from moefy.report.sections import subject, verdicts
from moefy.report.templates import template

Cells = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]
"""Header and rows of a table."""

TASKS = {"ForCausalLM": "text-generation", "ForMaskedLM": "fill-mask"}
"""Our tasks by the Hub's names, where it has one."""

PATH = "PATH"
"""The model's place in the snippet, until it is on the Hub."""


def model_card(
    run: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
    place: str = PATH,
    trained: Mapping[str, Any] | None = None,
) -> str:
    """The card of the model whose conversion.json is `run`, with the numbers of `report` if any.

    `trained` is the finetune.json of one that was fine-tuned; a report holds it.
    """
    label = subject(report) if report else None
    if report and label in report["finetune"]:
        trained = report["finetune"][label]["summary"]
    licence, name = run.get("licence") or {}, model_name(run)
    return template("card.md.jinja", escaped=escaped, file_name=_file_name).render(
        run=run,
        trained=trained,
        place=place,
        metadata=_metadata(run, _results(run, report, label) if report and label else []),
        name=name,
        link=f"[`{name}`](https://huggingface.co/{name})" if run["hub_id"] else f"`{name}`",
        active=f"{active_share(run):.0%}",
        routed=run["shape"]["num_experts"],
        copies=run["shape"].get("granularity", 0),
        shape=shape_text(run),
        own=run["target"] == OWN,
        engines=[name for name in run["engines"] if name != "transformers"],
        auto="AutoModel" + run["task"].removeprefix("Model"),
        measured=_measured(report, label) if report and label else [],
        licence=licence.get("license_name") or licence.get("license"),
        methods=sources(run["recipe"]) if run.get("recipe") else [],
    )


def _metadata(run: Mapping[str, Any], results: list[Any]) -> str:
    """The YAML head of the card, as the Hub reads it."""
    from huggingface_hub import ModelCardData

    inherited = run.get("licence") or {}
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


def _results(run: Mapping[str, Any], report: Mapping[str, Any], label: str) -> list[Any]:
    """The report's scores of the model, as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    task = TASKS.get(run["task"], "text-generation")
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


def _measured(report: Mapping[str, Any], label: str) -> list[str]:
    """The advice and the tables of what was measured."""
    tables: list[Cells] = [_quality(report["texts"], label)]
    tables += [_benchmarks(report["benchmarks"], label)]
    tables += _behaviour(report["behaviour"], label)
    tables += [(section_frontier.HEADER, section_frontier.table(report))]
    tables += [(section_quantized.HEADER, section_quantized.rows(report))]
    tables += [(section_lost.HEADER, section_lost.rows(report)[:5])]
    tables += [_speed(engine, speed["rows"], label) for engine, speed in report["speed"].items()]
    return [*map(verdict, verdicts(report)), *(table(*one) for one in tables if one[1])]


def _quality(texts: Mapping[str, Any], label: str) -> Cells:
    header = ("text", "dense perplexity", "perplexity", "dNLL", "KL", "same first choice")
    rows = [
        (
            text,
            fixed(scores["dense"]["perplexity"]),
            fixed(scores[label]["perplexity"]),
            uncertain(scores[label].get("dnll"), scores[label].get("dnll_standard_error")),
            fixed(scores[label].get("kl"), 3),
            percent(scores[label].get("top1_agreement")),
        )
        for text, scores in texts.items()
        if label in scores and "dense" in scores
    ]
    return header, rows


def _benchmarks(benchmarks: Mapping[str, Any], label: str) -> Cells:
    rows = [
        (
            name,
            str(scores[label]["metric"]),
            uncertain(scores.get("dense", {}).get("value"), None),
            uncertain(scores[label]["value"], scores[label].get("standard_error")),
        )
        for name, scores in benchmarks.items()
        if scores.get(label, {}).get("value") is not None
    ]
    return ("benchmark", "metric", "dense", "this model"), rows


def _behaviour(behaviour: Mapping[str, Any], label: str) -> list[Cells]:
    """The shares of answers, with 95 % intervals; the user's own prompts have no name here."""
    tables = []
    for number, answered in enumerate((behaviour.get("sets") or {}).values()):
        own, dense = (answered["figures"][name] for name in (label, "dense"))
        rows = [
            (name, *(ranged(one[key]["share"], one[key]["low"], one[key]["high"]) for one in both))
            for key, name in section_behaviour.FIGURES.items()
            if key in own
            for both in [(dense, own)]
        ]
        whose = "other" if number else "moefy's"
        count = len(answered["answers"])
        tables.append(((f"answers to {count} of {whose} prompts", "dense", "this model"), rows))
    return tables


def _speed(engine: str, rows: list[Mapping[str, Any]], label: str) -> Cells:
    """Ratios by phase and batch, at the shortest context."""
    rows = [row for row in rows if row["label"] == label and row.get("ratio")]
    shortest = min((row.get("context") or 0 for row in rows), default=0)
    rows = [row for row in rows if (row.get("context") or 0) == shortest]
    batches = sorted({row["batch"] for row in rows})
    ratios = {(row["phase"], row["batch"]): times(row["ratio"]) for row in rows}
    cells = [
        (phase, *(ratios.get((phase, batch), "") for batch in batches))
        for phase in dict.fromkeys(row["phase"] for row in rows)
    ]
    header = (f"speed in {engine}, relative to dense", *(f"batch {n}" for n in batches))
    return header, cells


def _file_name(source: object) -> str:
    """The name of a text, without the folder that it lay in."""
    return str(source).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
