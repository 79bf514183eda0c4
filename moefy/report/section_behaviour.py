"""Behaviour: whether answers loop, end, and hold the JSON that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moefy.report.document import Section, Table, Voices
from moefy.report.format import computed_in, ranged

FIGURES = {
    "loops": "end in a loop",
    "stops": "end by themselves",
    "json": "hold the JSON",
    "keys": "with all keys",
}
"""What is measured of answers, as the heads of columns."""

LENGTH = 400
"""Characters of an answer that are shown."""

ALIKE = 2
"""Examples of answers that behave alike, after one where they do not."""


def behaviour(report: Mapping[str, Any], main: str | None) -> Section:
    """The figures of each set of prompts, and a few answers of each model side by side."""
    part = report["behaviour"]
    sets = part.get("sets") or {}
    tables = []
    for name, answered in sets.items():
        figures, answers = answered["figures"], answered["answers"]
        caption = (
            f"Answers to {name}: {len(answers)} prompts, {answered['tokens']} tokens each at most"
            f"{computed_in(report)}"
        )
        known = [figure for figure in FIGURES if figure in figures["dense"]]
        header = ("model", *(FIGURES[figure] for figure in known))
        tables.append(Table(caption, header, tuple(rows(figures, known))))
        tables += _by_kind(name, answers, [*figures])
    examples = next((answered["answers"] for answered in sets.values()), ())
    lead = [
        "Each model answers by greedy decoding without penalties. In brackets are 95 % intervals, "
        "Wilson's for shares and Newcombe's for differences, paired by prompt.",
        " ".join(f"“{FIGURES[name]}” means: {text}." for name, text in _meaning(part)),
    ]
    if not part.get("chat"):
        lead.append(
            "The tokenizer has no chat template, so the prompts are plain text. A base model goes "
            "on writing after them: it need not end by itself, and may loop when dense, too."
        )
    voices = tuple(_voices(row) for row in _chosen(examples, main))
    return Section(
        "behaviour", "Does it loop, stop and keep to JSON?", tuple(lead), (), tuple(tables), voices
    )


def _meaning(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, part["meaning"][name]) for name in FIGURES if name in part.get("meaning", {})]


def rows(figures: Mapping[str, Any], known: Sequence[str]) -> list[tuple[str, ...]]:
    """Shares of each model, and under each but the dense one the differences."""
    result = []
    for label, own in figures.items():
        shares = (own[name] for name in known)
        result.append((label, *(ranged(row["share"], row["low"], row["high"]) for row in shares)))
        if label != "dense":
            lows = ("difference", "difference_low", "difference_high")
            cells = (ranged(*(own[name][key] for key in lows), sign="+") for name in known)
            result.append((f"{label}: minus dense", *cells))
    return result


def _by_kind(name: str, answers: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[Table]:
    """How many answers loop and end, by the kind of prompt."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in answers:
        if row.get("kind"):
            kinds.setdefault(row["kind"], []).append(row["written"])
    table = []
    for kind, written in kinds.items():
        counts = (
            "{} / {}".format(
                *(sum(one[label][key] for one in written) for key in ("loops", "stops"))
            )
            for label in labels
        )
        table.append((kind, str(len(written)), *counts))
    caption = f"Loops / ends by itself, by the kind of {name}"
    header = ("kind", "prompts", *labels)
    return [Table(caption, header, tuple(table), folded=True, on_terminal=False)] if table else []


def _chosen(answers: Sequence[Mapping[str, Any]], main: str | None) -> list[Mapping[str, Any]]:
    """The first answers that behave in another way than dense, and some of the rest, spread out."""

    def differs(row: Mapping[str, Any]) -> bool:
        own, dense = row["written"].get(main), row["written"]["dense"]
        return own is not None and any(own.get(name) != dense.get(name) for name in FIGURES)

    other = [row for row in answers if differs(row)]
    alike = [row for row in answers if not differs(row)]
    return other[:1] + alike[:: -(-len(alike) // ALIKE) or 1]


def _voices(row: Mapping[str, Any]) -> Voices:
    """Answers to a prompt, shortened, each with what it is found to do."""
    answers = []
    for label, answer in row["written"].items():
        text = answer["text"].strip()
        text = text if len(text) <= LENGTH else text[: LENGTH - 1] + "…"
        faults = ["loops"] * answer["loops"] + ["does not end"] * (not answer["stops"])
        faults += ["no JSON"] * (answer.get("json") is False)
        answers.append((label, f"{text} [{', '.join(faults)}]" if faults else text))
    return Voices(row["prompt"].strip(), tuple(answers))
