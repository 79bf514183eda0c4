"""The pictures: each function draws a figure from plain numbers, without a report."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moefy.report.chart import CARD, INK, MUTED, SERIES, Look, name_lines, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Line:
    """Joined points; `low` and `high` are the bounds of each, if known."""

    name: str
    look: Look
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    points: bool = True


def forest(
    groups: Mapping[str, Sequence[tuple[str, Look, float, float | None]]], *, axis: str
) -> Figure:
    """Values of several models with two standard errors to each side, one panel per group.

    A row is (name, look, value, standard error).
    """
    sizes = [(title, len(rows)) for title, rows in groups.items()]
    figure, axes = panels(
        len(groups),
        height=0.6 + sum(0.29 * count + (0.42 if title else 0.1) for title, count in sizes),
        sharex=True,
        gridspec_kw={"height_ratios": [count + 1 for _, count in sizes]},
    )
    ends = [value + 2 * (error or 0) for rows in groups.values() for _, _, value, error in rows]
    starts = [value - 2 * (error or 0) for rows in groups.values() for _, _, value, error in rows]
    low, high = min(0.0, *starts), max(0.0, *ends)
    span = (high - low) or 1.0
    for axis_of, (title, rows) in zip(axes[:, 0], groups.items(), strict=True):
        if title:
            axis_of.set_title(short(title, 48))
        axis_of.grid(axis="y", visible=False)
        axis_of.grid(axis="x", visible=True)
        axis_of.axvline(0, color=INK, linewidth=1)
        for row, (_, look, value, error) in enumerate(rows):
            if error:
                axis_of.plot(
                    [value - 2 * error, value + 2 * error], [row, row], color=look.colour,
                    alpha=0.45, linewidth=5, solid_capstyle="butt",
                )  # fmt: skip
            axis_of.plot([value], [row], look.marker, color=look.colour)
            at = value + 2 * (error or 0)
            _label(axis_of, f"{value:.2f}", (at, row), 8, fontsize=10)
        axis_of.set_yticks(range(len(rows)), [wrapped(row[0]) for row in rows], color=INK)
        axis_of.set_ylim(len(rows) - 0.4, -0.6)
        axis_of.set_xlim(low - 0.03 * span, high + 0.16 * span)
        axis_of.spines["bottom"].set_visible(False)
        axis_of.tick_params(length=0)
    axes[-1, 0].set_xlabel(axis)
    return figure


def curves(
    rows: Sequence[Mapping[str, Any]],
    axis: str,
    keys: Mapping[str, tuple[str, Look]],
    *,
    points: bool = False,
) -> list[Line]:
    """The values of each key, by (name, look), against those of `axis`, where rows have some."""
    lines = []
    for key, (name, look) in keys.items():
        if known := [row for row in rows if row.get(key) is not None]:
            x, y = [row[axis] for row in known], [row[key] for row in known]
            lines.append(Line(name, look, x, y, points=points or len(x) < 2, dashed=points))
    return lines


def lines(
    drawn: Sequence[Line],
    *,
    x_axis: str,
    height: float = 3.2,
    percent: bool = False,
    from_zero: bool = False,
) -> Figure:
    """Lines with their names at their ends, or above where the ends lie too close together."""
    figure, axes = panels(height=height)
    axis = axes[0, 0]
    for line in drawn:
        _draw(axis, line)
    if percent:
        from matplotlib.ticker import PercentFormatter

        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if from_zero:
        axis.set_ylim(bottom=min(0.0, *(min(line.y) for line in drawn)))
    axis.set_xlabel(x_axis)
    axis.margins(x=0.02)
    low, high = axis.get_ylim()
    ends = sorted(line.y[-1] for line in drawn)
    close = any(b - a < (high - low) / 16 for a, b in itertools.pairwise(ends))
    if close:
        _legend(figure, drawn)
    else:
        name_lines(axis, [(short(line.name, 26), line.y[-1], line.look.colour) for line in drawn])
    return figure


@dataclass(frozen=True)
class Spot:
    """A model as one point of a frontier."""

    name: str
    look: Look
    x: float
    y: float
    a_model: bool = True
    """Whether it can be had; an oracle is no model, and no frontier goes through it."""


LEAST = 0.01
"""KL below which the axis of a frontier is linear, so that the dense model's zero is on it."""


def frontier(spots: Sequence[Spot], bands: Sequence[tuple[float, str]], *, axis: str) -> Figure:
    """Loss against cost, with a line through the best points and the `bands` of loss in words."""
    figure, axes = panels(height=4.4)
    axis_of = axes[0, 0]
    top = 1.6 * max(0.5, *(spot.y for spot in spots))
    axis_of.set_yscale("symlog", linthresh=LEAST)
    axis_of.set_ylim(-LEAST / 2, top)
    low, high = min(spot.x for spot in spots), max(spot.x for spot in spots)
    room = (high - low) or high
    axis_of.set_xlim(low - 0.1 * room, high + 0.3 * room)
    edges = [most for most, _ in bands if most < top]
    axis_of.set_yticks([0, LEAST, *edges, 1.0][: len(edges) + 2 + (top > 1)])
    axis_of.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis_of.minorticks_off()
    for most, word in bands:
        upper = min(most, top)
        axis_of.annotate(
            word, (1, upper), (4, -2), xycoords=axis_of.get_yaxis_transform(),
            textcoords="offset points", va="top", color=MUTED, fontsize=9,
        )  # fmt: skip
        if upper == top:
            break
    best = front([(spot.x, spot.y) for spot in spots if spot.a_model])
    axis_of.step(*zip(*best, strict=True), where="post", color=MUTED, linewidth=1.2, zorder=1)
    for spot in spots:
        style = {} if spot.a_model else {"markerfacecolor": CARD, "markeredgewidth": 1.5}
        axis_of.plot([spot.x], [spot.y], spot.look.marker, color=spot.look.colour, **style)
    axis_of.set_xlabel(axis)
    axis_of.set_ylabel("KL to dense, nats per token")
    _name_spots(axis_of, spots)
    return figure


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one is better than in both, by rising x.

    >>> front([(3, 0), (1, 5), (2, 6), (2, 2)])
    [(1, 5), (2, 2), (3, 0)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def _name_spots(axis: Any, spots: Sequence[Spot]) -> None:
    """Names to the right of the points, moved down where they would cover another or its point."""
    places = axis.transData.transform([(spot.x, spot.y) for spot in spots]) * 72 / axis.figure.dpi
    taken = [(x - 4, x + 4, y) for x, y in places]
    for spot, (x, y) in sorted(zip(spots, places, strict=True), key=lambda pair: -pair[0].y):
        name = short(spot.name, 25)
        left, right, down = x + 5, x + 5.4 * len(name) + 8, 0.0
        while any(
            abs(y - down - other) < 10 and left < end and start < right
            for start, end, other in taken
        ):
            down += 1
        taken.append((left, right, y - down))
        axis.annotate(
            name, (spot.x, spot.y), (6, -down), textcoords="offset points", va="center",
            color=spot.look.colour, fontsize=9.5,
            bbox={"facecolor": CARD, "edgecolor": "none", "pad": 0, "alpha": 0.7},
        )  # fmt: skip


def speed(drawn: Sequence[Line], ideal: Sequence[tuple[float, float]]) -> Figure:
    """Speed relative to dense against the batch: above one is faster, below slower.

    `ideal` are the points (batch, ratio) that arithmetic would allow.
    """
    figure, axes = panels(height=3.4)
    axis = axes[0, 0]
    values = [y for line in drawn for y in (*line.y, *line.low, *line.high)]
    values += [1.0, *(ratio for _, ratio in ideal)]
    low, high = min(values), max(values)
    pad = 0.12 * max(high - low, 0.4)
    low, high = low - pad, high + pad
    axis.axhspan(1, high, color=SERIES["green"], alpha=0.07, linewidth=0)
    axis.axhspan(low, 1, color=SERIES["vermillion"], alpha=0.07, linewidth=0)
    for line in drawn:
        _draw(axis, line)
    axis.axhline(1, color=INK, linewidth=1.6)
    axis.set_xscale("log", base=2)
    places = sorted({x for line in drawn for x in line.x})
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.set_xlim(places[0] / 1.4, places[-1] * 1.4)
    axis.set_ylim(low, high)
    axis.yaxis.set_major_formatter(lambda value, _: f"{round(value, 2):g}×")
    axis.set_xlabel("sequences at once (batch)")
    inside = {"transform": axis.get_yaxis_transform(), "fontsize": 10, "fontweight": "bold"}
    step = 0.012 * (high - low)
    axis.text(0.015, 1 + step, "faster ↑", color=SERIES["green"], va="bottom", **inside)
    axis.text(0.015, 1 - step, "slower ↓", color=SERIES["vermillion"], va="top", **inside)
    ends = [("dense", 1.0, INK)]
    if len(drawn) > 2:
        _legend(figure, drawn)
    else:
        ends += [(short(line.name, 26), line.y[-1], line.look.colour) for line in drawn]
    if ideal:
        x, y = zip(*ideal, strict=True)
        if len(set(y)) == 1:
            x, y = axis.get_xlim(), (y[0], y[0])
        axis.plot(x, y, color=MUTED, linewidth=1.4, linestyle=(0, (5, 3)))
        ends.append((f"ideal {y[-1]:.2f}×", y[-1], MUTED))
    name_lines(axis, ends)
    return figure


def parameters(rows: Sequence[tuple[str, Look, float, float]]) -> Figure:
    """For each model a pale bar with a solid one inside: (name, look, active, all), in millions."""
    figure, axes = panels(height=0.8 + 0.36 * len(rows))
    axis_of = axes[0, 0]
    axis_of.grid(axis="y", visible=False)
    axis_of.grid(axis="x", visible=True)
    for row, (_, look, solid, pale) in enumerate(rows):
        axis_of.barh(row, pale, color=look.colour, alpha=0.28, height=0.66)
        axis_of.barh(row, solid, color=look.colour, height=0.66)
        label = f"{solid:,.1f}" if solid == pale else f"{solid:,.1f} of {pale:,.1f}"
        _label(axis_of, label, (pale, row), 6, fontsize=10)
    axis_of.set_yticks(range(len(rows)), [wrapped(row[0]) for row in rows], color=INK)
    axis_of.set_ylim(len(rows) - 0.4, -0.6)
    axis_of.set_xlim(0, 1.34 * max(pale for *_, pale in rows))
    axis_of.set_title("active per token (solid) of all (pale)", fontsize=10.5, fontweight="normal")
    axis_of.set_xlabel("million parameters")
    return figure


def short(text: str, length: int) -> str:
    """`text` on one line, cut at `length` characters.

    >>> short("a quiet river", 9)
    'a quiet …'
    """
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def wrapped(name: str) -> str:
    """A name over at most three lines of 22 characters."""
    return "\n".join(textwrap.wrap(name, 22, max_lines=3, placeholder=" …")) or name


def _label(axis: Any, text: str, at: tuple[float, float], shift: int, **style: Any) -> None:
    """Write `text` beside a point, `shift` units to the right."""
    style = {"color": INK, "fontsize": 10.5, **style}
    axis.annotate(text, at, (shift, 0), textcoords="offset points", va="center", **style)


def _legend(figure: Figure, drawn: Sequence[Line]) -> None:
    """The names of the lines above the axes, in rows of a phone's width."""
    columns = max(1, min(len(drawn), 60 // (6 + max(len(short(line.name, 40)) for line in drawn))))
    legend = figure.legend(
        loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.8
    )
    for text, line in zip(legend.get_texts(), drawn, strict=True):
        text.set_color(line.look.colour)


def _draw(axis: Any, line: Line) -> None:
    if line.low and len(line.x) == 1:
        axis.vlines(line.x, line.low, line.high, color=line.look.colour, alpha=0.45, linewidth=5)
    elif line.low:
        axis.fill_between(
            line.x, line.low, line.high, color=line.look.colour, alpha=0.15, linewidth=0
        )
    axis.plot(
        line.x,
        line.y,
        marker=line.look.marker if line.points else None,
        linestyle=(0, (4, 2)) if line.dashed else "-",
        color=line.look.colour,
        markeredgewidth=0,
        label=short(line.name, 40),
    )
