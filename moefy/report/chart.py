"""The style of all pictures: size, type, and colours that follow the page's theme.

A picture is drawn in the colours of the light theme. In its SVG each of them becomes a CSS variable
of that name, which the page sets for light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, CARD = "#1d2329", "#5b646e", "#dcdcd6", "#fffefb"
SERIES = {
    "blue": "#0a66b0",
    "vermillion": "#d2500a",
    "green": "#0b8a66",
    "purple": "#9a4a9c",
    "amber": "#a87400",
    "grey": "#747c85",
}
"""Hues of Okabe and Ito, distinct for colour-blind readers, dark enough for white."""

RAMP = (
    "#9c4a00",
    "#cf7a2e",
    "#e8b07f",
    "#f4dcc6",
    "#efeee9",
    "#cfdff0",
    "#8db6dc",
    "#3f83bd",
    "#0b4f8a",
)
"""From less than an even share of the load to more, in steps."""

THEME = {INK: "ink", MUTED: "muted", GRID: "grid", CARD: "card"}
THEME |= {colour: name for name, colour in SERIES.items()}
THEME |= {colour: f"ramp-{number}" for number, colour in enumerate(RAMP)}

WIDTH = 5.6
"""Inches, of 72 units each: about the width of a phone."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moefy",
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """The colour and the marker of a model in every picture and table."""

    colour: str
    marker: str


Looks = Mapping[str, Look]
"""The look of each model, by its label."""

GLYPHS = dict(zip("oDs^vXP<>p", "●◆■▲▼✖✚◀▶⬟", strict=True))
"""Marker of a picture -> the same as a letter."""

CONTROLS = {"static": ("amber", "s"), "oracle": ("green", "^"), "random": ("grey", "v")}


def looks(kinds: Mapping[str, str]) -> Looks:
    """A look for each model, by its kind; models of one kind differ at least in their markers."""
    hues = {
        "converted": ["blue", "purple", "green", "amber"],
        "finetuned": ["vermillion", "amber", "purple", "green"],
        "other": ["purple", "green", "amber", "grey"],
    }
    markers = {"converted": "oPXs", "finetuned": "D<>p", "other": "PXvs"}
    result: dict[str, Look] = {}
    counts: dict[str, int] = {}
    for label, kind in kinds.items():
        word = next((word for word in CONTROLS if label.startswith(word)), None)
        if kind == "dense":
            result[label] = Look(INK, "o")
        elif kind == "control" and word and label.count(",") == 0:
            hue, marker = CONTROLS[word]
            result[label] = Look(SERIES[hue], marker)
        elif kind == "rival":
            number = counts.setdefault(kind, 0) % len(GLYPHS)
            counts[kind] += 1
            result[label] = Look(MUTED, [*GLYPHS][number])
        else:
            kind = kind if kind in hues else "other"
            number = counts.setdefault(kind, 0) % 4
            counts[kind] += 1
            result[label] = Look(SERIES[hues[kind][number]], markers[kind][number])
    return result


def panels(rows: int = 1, columns: int = 1, *, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure with `rows` x `columns` axes (an array, also when there is one)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def name_lines(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names of lines, `(name, height at its right end, colour)` each, to the right of the axes.

    They are moved apart where they would overlap, but stay within the axes.
    """
    low, high = axes.get_ylim()
    figure = axes.get_figure()
    assert figure is not None, "axes are part of a figure"
    gap = (high - low) * 14 / max(figure.get_figheight() * 72 - 50, 60)  # pyright: ignore
    order = sorted(ends, key=lambda end: end[1])
    places: list[float] = []
    for _, y, _ in order:
        places.append(max(y, places[-1] + gap) if places else y)
    ceiling = high
    for number in reversed(range(len(places))):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - gap
    for (name, _, colour), place in zip(order, places, strict=True):
        axes.annotate(
            name, (1, place), (5, 0), xycoords=axes.get_yaxis_transform(),
            textcoords="offset points", va="center", color=colour, fontsize=10.5,
        )  # fmt: skip


def svg(draw: Callable[[], Figure], name: str, alt: str) -> str:
    """A figure as an inline SVG element with text as text, whose ids begin with `name`."""
    import matplotlib

    buffer = StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE):
        draw().savefig(buffer, format="svg", metadata=unsaid)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;? ?|font: [^;\"]*px [^;\"]*;? ?", _only_size, text)
    used = set(re.findall(r"(?:href=\"#|url\(#)([\w.-]+)", text))
    text = re.sub(
        r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text
    )
    text = re.sub(r"(href=\"#|url\(#)", rf"\g<1>{name}-", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var(--{variable})")
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    head = f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">'
    return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :]).strip()


def _only_size(match: re.Match[str]) -> str:
    """The size and the weight of a font; the page sets the family."""
    size = re.search(r"([\d.]+)px", match[0])
    bold = "font-weight: 600; " if "bold" in match[0] or " 700 " in match[0] else ""
    return f"{bold}font-size: {size[1]}px; " if size else ""
