"""Routing, and the error of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from moefy.report import figures
from moefy.report.chart import INK, SERIES, Look, Looks
from moefy.report.document import Picture, Section, Table
from moefy.report.format import fixed
from moefy.report.heatmaps import heat, squares

SCALE = ("less than an even share", "more")
MANY = 400
"""Experts in all layers together above which only three layers' tokens are shown."""


def routing(report: Mapping[str, Any], looks: Looks) -> Section:
    """Which experts are used, by how much, and for which tokens."""
    models = {label: routed for label, routed in report["routing"].items() if routed.get("layers")}
    pictures: list[Picture] = []
    together: list[Picture] = []
    tables: list[Table] = []
    for number, (label, routed) in enumerate(models.items()):
        layers = routed["layers"]
        alt = f"Load of each expert in each layer of {label}. {_extremes(layers)}"
        draw = partial(heat, {label: _loads(layers)})
        pictures.append(Picture(f"load-{number}", f"Load: {label}", alt, draw, SCALE))
        texts = {name: part["layers"] for name, part in (routed.get("by_text") or {}).items()}
        if len(texts) > 1:
            alt = f"Load of the experts of {label}, by text. " + ". ".join(
                f"{name}: {_extremes(part)}" for name, part in texts.items()
            )
            maps = {name: _loads(part) for name, part in list(texts.items())[:4]}
            title = f"Which text goes where: {label}"
            pictures.append(Picture(f"by-text-{number}", title, alt, partial(heat, maps), SCALE))
        together += _together(label, layers, number)
        tables += _tokens(label, layers)
    if models:
        pictures += [*together, *_per_layer(models, looks)]
        tables = _balance(models) + tables
    lead = (
        "An expert's load is its share of all choices, relative to an even share. A dead expert "
        "(a cross) is never chosen. Where all experts do equal work, the coefficient of variation "
        "(CV) of the loads is 0 and the entropy is 1.",
    )
    return Section("routing", "Who does the work?", lead, tuple(pictures), tuple(tables))


def _loads(layers: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[float]]]:
    return [(row["layer"], row["load_E"]) for row in layers]


def _extremes(layers: Sequence[Mapping[str, Any]]) -> str:
    """The most and the least used expert, in words."""
    shares = [(share * len(row["load_E"]), row["layer"], expert)
              for row in layers for expert, share in enumerate(row["load_E"])]  # fmt: skip
    most, least = max(shares), min(shares)
    dead = sum(share == 0 for share, *_ in shares)
    return (
        f"Most used: expert {most[2]} of layer {most[1]}, {most[0]:.1f} times an even share; "
        f"least: expert {least[2]} of layer {least[1]}, {least[0]:.2f} times; {dead} dead"
    )


def _together(label: str, layers: Sequence[Mapping[str, Any]], number: int) -> list[Picture]:
    """Which experts are chosen together, in the first, the middle and the last layer."""
    known = [row for row in layers if row.get("coactivation_EE") and len(row["load_E"]) <= 64]
    shown = _three(known)
    if not shown or not any(
        value for row in shown for a, line in enumerate(row["coactivation_EE"])
        for b, value in enumerate(line) if a != b
    ):  # fmt: skip
        return []
    maps = {f"layer {row['layer']}": row["coactivation_EE"] for row in shown}
    alt = f"How often two experts of {label} are chosen for the same token, in " + ", ".join(maps)
    title = f"Which experts work together: {label}"
    scale = ("less often than the mean pair", "more often")
    draw = partial(squares, maps)
    return [Picture(f"together-{number}", title, alt, draw, scale)]


def _three(rows: Sequence[Any]) -> list[Any]:
    """The first, the middle and the last."""
    places = sorted({0, len(rows) // 2, len(rows) - 1}) if rows else []
    return [rows[place] for place in places]


def _per_layer(models: Mapping[str, Mapping[str, Any]], looks: Looks) -> list[Picture]:
    """How uneven the loads are in each layer."""
    drawn = [
        line
        for label, routed in models.items()
        for line in figures.curves(routed["layers"], "layer", {"load_cv": (label, looks[label])})
    ]
    alt = "Coefficient of variation of the loads by layer. " + "; ".join(
        f"{line.name}: from {min(line.y):.2f} to {max(line.y):.2f}" for line in drawn
    )
    draw = partial(figures.lines, drawn, x_axis="layer", from_zero=True)
    return [Picture("load-cv", "How uneven the loads are (CV)", alt, draw)]


BALANCE = ("model", "mean CV", "largest CV", "mean entropy", "least entropy", "dead experts")


def _balance(models: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """How evenly each model uses its experts, over all texts and on each one."""
    total = tuple(_balance_row(label, routing["layers"]) for label, routing in models.items())
    by_text = tuple(
        _balance_row(f"{label}: {text}", part["layers"])
        for label, routing in models.items()
        for text, part in (routing.get("by_text") or {}).items()
    )
    tables = [Table("Balance of the experts, over all texts", BALANCE, total)]
    if by_text:
        tables.append(Table("Balance by text", BALANCE, by_text, folded=True, on_terminal=False))
    return tables


def _balance_row(name: str, layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    cv, entropy = ([row[key] for row in layers] for key in ("load_cv", "entropy"))
    return (
        name,
        fixed(fmean(cv)),
        fixed(max(cv)),
        fixed(fmean(entropy), 3),
        fixed(min(entropy), 3),
        str(sum(row["dead"] for row in layers)),
    )


def _tokens(label: str, layers: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tokens that each expert is chosen for most."""
    known = [row for row in layers if row.get("top_tokens")]
    if sum(len(row["load_E"]) for row in known) > MANY:
        known = _three(known)
    rows = tuple(
        (
            f"layer {row['layer']}, expert {expert}",
            f"{share:.1%}",
            "  ".join(_token(token["token"]) for token in tokens[:12]),
        )
        for row in known
        for expert, (share, tokens) in enumerate(
            zip(row["load_E"], row["top_tokens"], strict=False)
        )
    )
    header = ("expert", "load", "chosen most for")
    caption = f"Top tokens of each expert: {label}"
    return [Table(caption, header, rows, folded=True, on_terminal=False)] if rows else []


def _token(token: str) -> str:
    """The text of a token, with visible spaces and line ends."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return "".join(c if c.isprintable() else "�" for c in shown)


ERRORS = {
    "error": ("copies", Look(SERIES["blue"], "o")),
    "error_before_refit": ("before the refit", Look(SERIES["grey"], "o")),
    "error_after_refit": ("after the refit", Look(SERIES["blue"], "o")),
    "error_after_polish": ("after the polish", Look(SERIES["green"], "o")),
}
ENERGY = {
    "energy_neurons": ("best neurons", Look(INK, "o")),
    "energy_oracle": ("oracle", Look(SERIES["green"], "^")),
    "energy_router": ("router", Look(SERIES["blue"], "o")),
    "energy_static": ("static", Look(SERIES["amber"], "s")),
    "energy_random": ("by lot", Look(SERIES["grey"], "v")),
}


def layers(report: Mapping[str, Any]) -> Section:
    """The error of each layer at its conversion, on held-out calibration text."""
    rows = report["run"].get("layers") or []
    pictures = []
    for name, title, keys in (
        ("layer-energy", "Output energy kept", ENERGY),
        ("layer-error", "Relative output error", ERRORS),
    ):
        if drawn := figures.curves(rows, "layer", keys):
            alt = f"{title} by layer. " + "; ".join(
                f"{n.name}: from {min(n.y):.2f} to {max(n.y):.2f}, {sum(n.y) / len(n.y):.2f} on "
                "average"
                for n in drawn
            )
            draw = partial(
                figures.lines, drawn, x_axis="layer", from_zero="error" in name,
                percent="energy" in name, height=3.6,
            )  # fmt: skip
            pictures.append(Picture(name, title, alt, draw))
    evenness, tables = _evenness(rows)
    pictures += evenness
    lead = (
        "Measured while converting, on held-out calibration text. Energy is the share of the dense "
        "FFN's output that stays when a token chooses its best neurons, its best experts (oracle), "
        "the router's experts, random experts (by lot), or the same neurons as all tokens "
        "(static). The figures are in moefy/conversion.md.",
    )
    return Section("layers", "Layer by layer", lead, tuple(pictures), tuple(tables))


def _evenness(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Picture], list[Table]]:
    """The cost of evening out the loads by biases, over the layers where that was tried."""
    curves = [row["balance"] for row in rows if row.get("balance")]
    if not curves:
        return [], []
    points = [
        (
            share[0]["share"],
            fmean([point["load_cv"] for point in share]),
            max(point["load_cv"] for point in share),
            fmean([point["worth"] for point in share]),
        )
        for share in zip(*curves, strict=True)
    ]
    look = Look(SERIES["blue"], "o")
    _, even, _, worth = zip(*points, strict=True)
    line = figures.Line("", look, even, worth)
    alt = "What the router's experts are worth against how uneven their loads are. " + "; ".join(
        f"{worth:.1%} at {cv:.2f}" for _, cv, _, worth in points
    )
    axis = "coefficient of variation of the loads, mean of the layers"
    draw = partial(figures.lines, [line], x_axis=axis, percent=True)
    title = "What even loads cost"
    header = ("share of the biases", "mean CV", "largest CV", "worth")
    table = Table(
        "Even loads: each layer takes the least share of the balancing biases that is enough",
        header,
        tuple((f"{s:.0%}", fixed(cv), fixed(top), f"{w:.2%}") for s, cv, top, w in points),
        folded=True,
        on_terminal=False,
    )
    return [Picture("evenness", title, alt, draw)], [table]
