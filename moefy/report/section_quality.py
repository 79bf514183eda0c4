"""Quality: scores on texts, tasks and prompts against the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from moefy.report import figures
from moefy.report.chart import Look, Looks
from moefy.report.document import Picture, Section, Table, Voices
from moefy.report.format import computed_in, fixed, percent, probability, uncertain

SEEN = 0.01
"""Share of a text in the calibration text above which there is a warning."""

SCORES = ("model", "perplexity", "dNLL", "bits per byte", "KL to dense", "same first choice")

QUALITY = (
    "dNLL is the loss minus the dense model's, in nats per token: ln(perplexity / dense "
    "perplexity). KL is the divergence of the predicted distributions from the dense model's. "
    "“Same first choice” is how often both models predict the same token. Bars show two standard "
    "errors to each side, paired over windows of text."
)


def quality(report: Mapping[str, Any], looks: Looks) -> Section:
    """Perplexity, KL and agreement on each text."""
    texts = report["texts"]
    pictures = []
    for number, (text, rows) in enumerate(texts.items()):
        drawn = _losses(rows, looks)
        if drawn:
            alt = f"Loss of quality against the dense model on {text}, dNLL: {_in_words(drawn)}"
            draw = partial(figures.forest, {"": drawn}, axis="dNLL, nats per token: less is better")
            pictures.append(Picture(f"quality-{number}", f"Lost on {text}", alt, draw))
    tables = [
        Table(
            f"{text}, {next(iter(rows.values()))['tokens']:,} tokens{computed_in(report)}",
            SCORES,
            tuple(score_rows(rows)),
        )
        for text, rows in texts.items()
        if rows
    ]
    warnings = [f"Warning: {warning}." for warning in seen_warnings(report)]
    explained = " ".join(meanings(report))
    return Section(
        "quality",
        "What did it cost?",
        (*warnings, QUALITY, *([explained] if explained else [])),
        tuple(pictures),
        tuple(tables),
    )


def meanings(report: Mapping[str, Any]) -> list[str]:
    """What each control stands for; those that mean the same are named together."""
    labels: dict[str, list[str]] = {}
    for label, model in report["models"].items():
        if model.get("kind") in ("control", "rival", "other") and model.get("meaning"):
            labels.setdefault(model["meaning"], []).append(label)
    return [f"{', '.join(some)}: {meaning}." for meaning, some in labels.items()]


def seen_warnings(report: Mapping[str, Any]) -> list[str]:
    """Texts that were calibrated on, so that their scores are too good."""
    return [
        f"{share:.0%} of {text} stands word for word in the calibration text"
        for text, share in report["seen_in_calibration"].items()
        if share > SEEN
    ]


def _losses(rows: Mapping[str, Any], looks: Looks) -> list[tuple[str, Look, float, float | None]]:
    """The dNLL of each model but the dense one, as `figures.forest` takes it."""
    return [
        (label, looks[label], row["dnll"], row.get("dnll_standard_error"))
        for label, row in rows.items()
        if label != "dense" and row.get("dnll") is not None
    ]


def _in_words(drawn: Sequence[tuple[str, Look, float, float | None]]) -> str:
    """Values as text, for screen readers."""
    return ", ".join(f"{label} {value:.3f}" for label, _, value, _ in drawn)


def score_rows(rows: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One line per model, formatted as `SCORES` names it."""
    return [
        (
            label,
            fixed(row["perplexity"]),
            "" if label == "dense" else uncertain(row.get("dnll"), row.get("dnll_standard_error")),
            fixed(row.get("bits_per_byte"), 3),
            "" if label == "dense" else fixed(row.get("kl"), 3),
            "" if label == "dense" else percent(row.get("top1_agreement")),
        )
        for label, row in rows.items()
    ]


def benchmarks(report: Mapping[str, Any], looks: Looks) -> Section:
    """Scores of tasks, with the significance of the difference from dense."""
    run: dict[str, dict[str, Any]] = {}
    rows = []
    for task, scores in report["benchmarks"].items():
        for label, score in scores.items():
            if "not_run" in score or score.get("value") is None:
                rows.append((f"{task}: {label}", "not run", "", "", str(score.get("not_run", ""))))
                continue
            run.setdefault(task, {})[label] = score
            rows.append(
                (
                    f"{task}: {label}",
                    str(score.get("metric", "")),
                    uncertain(score["value"], score.get("standard_error")),
                    "" if label == "dense" else _signed(score.get("difference")),
                    "" if label == "dense" else probability(score.get("p_value")),
                )
            )
    pictures = []
    groups = {
        task: [
            (label, looks[label], score["value"], score.get("standard_error"))
            for label, score in scores.items()
        ]
        for task, scores in run.items()
    }
    if groups:
        values = ". ".join(f"{task}: {_in_words(drawn)}" for task, drawn in groups.items())
        alt = f"Benchmark scores. {values}"
        draw = partial(figures.forest, groups, axis="score, two standard errors to each side")
        pictures.append(Picture("benchmarks", "Scores", alt, draw))
    header = ("task: model", "metric", "score", "difference from dense", "p")
    table = Table("Benchmarks", header, tuple(rows))
    lead = (
        "Both models answer each item, and the difference is tested pairwise. * marks p < 0.05.",
    )
    return Section("benchmarks", "Benchmarks", lead, tuple(pictures), (table,) if rows else ())


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def robustness(report: Mapping[str, Any], looks: Looks) -> Section:
    """Scores and routing on unusual text."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    lost, moved = {}, {}
    for condition, scores in report["robustness"].items():
        for label, row in scores.items():
            dense = label == "dense"
            rows.setdefault(label, []).append(
                (
                    condition,
                    fixed(row.get("perplexity")),
                    "" if dense else fixed(row.get("dnll"), 3),
                    "" if dense else fixed(row.get("kl"), 3),
                    fixed(row.get("routing_entropy"), 3),
                    fixed(row.get("routing_drift"), 3),
                )
            )
        lost[condition] = _losses(scores, looks)
        moved[condition] = [
            (label, looks[label], row["routing_drift"], None)
            for label, row in scores.items()
            if row.get("routing_drift") is not None
        ]
    pictures = []
    for name, title, axis, groups in (
        ("robustness-loss", "Lost under other conditions", "dNLL, nats per token", lost),
        ("robustness-drift", "How far routing moves", "drift from ordinary text", moved),
    ):
        groups = {condition: drawn for condition, drawn in groups.items() if drawn}
        if groups:
            alt = f"{title}. " + ". ".join(f"{key}: {_in_words(n)}" for key, n in groups.items())
            draw = partial(figures.forest, groups, axis=axis)
            pictures.append(Picture(name, title, alt, draw))
    lead = (
        "Entropy is 1 where all experts are used evenly. Drift is the share of the choices that "
        "go to other experts than on ordinary text, from 0 to 1.",
    )
    header = ("condition", "perplexity", "dNLL", "KL to dense", "entropy", "drift")
    main = report.get("main")
    tables = tuple(
        Table(f"Other conditions: {label}", header, tuple(own), on_terminal=main in (None, label))
        for label, own in rows.items()
    )
    return Section("robustness", "Off the beaten track", lead, tuple(pictures), tables)


def prompts(report: Mapping[str, Any]) -> Section:
    """The user's own prompts, those that lost most first."""
    prompts = sorted(report["prompts"], key=lambda row: -(row.get("drop") or 0))
    labels = _in_order(label for row in prompts for label in row["scores"])
    header = ("prompt", "answer", *labels, "drop")
    rows: dict[bool, list[tuple[str, ...]]] = {True: [], False: []}
    for row in prompts:
        scores = (row["scores"].get(label) for label in labels)
        cells = (figures.short(row["prompt"], 80), figures.short(str(row.get("answer", "")), 40))
        numbers = (fixed(number, 3) for number in (*scores, row.get("drop")))
        rows[bool(row.get("flagged"))].append((*cells, *numbers))
    captions = {True: "Answers that became least likely", False: "The other answers"}
    tables = tuple(
        Table(
            captions[flagged],
            header,
            tuple(some),
            folded=not flagged and bool(rows[True]),
            on_terminal=flagged,
        )
        for flagged, some in rows.items()
        if some
    )
    lead = ("The mean log-likelihood that each model gives to a token of your answer, in nats.",)
    return Section("prompts", "Your prompts", lead, tables=tables)


def generation(report: Mapping[str, Any]) -> Section:
    """The same prompt, continued by each model."""
    voices = tuple(
        Voices(
            row["prompt"].strip(),
            tuple((label, text.strip()) for label, text in row["written"].items()),
        )
        for row in report["generation"]
    )
    lead = ("Greedy decoding: each model writes its most likely tokens.",)
    return Section("generation", "Side by side", lead, voices=voices)


def _in_order(values: Iterable[str]) -> Sequence[str]:
    """Each value once, in the order in which it first came."""
    return tuple(dict.fromkeys(values))
