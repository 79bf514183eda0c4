"""Maps of cells: the load of every expert in every layer, and pairs of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moefy.report.chart import CARD, RAMP, panels
from moefy.report.figures import short

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat(maps: Mapping[str, Sequence[tuple[int, Sequence[float]]]]) -> Figure:
    """Load of each expert (columns) in each layer (rows), one map beside the other.

    A row is (layer, shares). Colours show shares relative to an even one; a cross is a dead expert.
    """
    num_rows = max(len(rows) for rows in maps.values())
    step = 0.15 if num_rows <= 48 else 0.09
    figure, axes = panels(1, len(maps), height=0.85 + step * max(num_rows, 6), sharey=True)
    for axis, (title, rows) in zip(axes[0], maps.items(), strict=True):
        axis.grid(visible=False)
        _cells(axis, [[share * len(shares) for share in shares] for _, shares in rows])
        layers = [layer for layer, _ in rows]
        every = max(1, math.ceil(len(layers) / 16))
        axis.set_yticks(range(0, len(layers), every), [str(n) for n in layers[::every]])
        axis.spines["bottom"].set_visible(False)
        width = len(rows[0][1])
        every = max(1, math.ceil(width * len(maps) / 32))
        axis.set_xticks(range(0, width, every), [str(n) for n in range(0, width, every)])
        axis.tick_params(length=0)
        axis.set_xlabel("expert")
        if len(maps) > 1:
            axis.set_title(short(title, 44 // len(maps)), fontsize=11)
    axes[0, 0].set_ylabel("layer")
    return figure


def squares(maps: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Matrices over pairs of experts, each cell relative to the mean off the diagonal."""
    figure, axes = panels(1, len(maps), height=0.7 + (4.6 / len(maps)))
    for axis, (title, matrix) in zip(axes[0], maps.items(), strict=True):
        axis.grid(visible=False)
        off = [v for a, row in enumerate(matrix) for b, v in enumerate(row) if a != b]
        mean = sum(off) / len(off) if off and sum(off) else 1.0
        _cells(axis, [[math.nan if a == b else v / mean for b, v in enumerate(row)]
                      for a, row in enumerate(matrix)], crosses=False)  # fmt: skip
        axis.set_aspect("equal")
        axis.spines["bottom"].set_visible(False)
        every = max(1, math.ceil(len(matrix) * len(maps) / 32))
        ticks = list(range(0, len(matrix), every))
        axis.set_xticks(ticks)
        axis.set_yticks(ticks)
        axis.tick_params(length=0)
        axis.set_title(short(title, 16), fontsize=11)
    return figure


STEPS = (0.25, 0.42, 0.65, 0.87, 1.15, 1.54, 2.4, 4.0)
"""Where one colour of `RAMP` ends and the next begins, as multiples of an even share."""


def _cells(axis: Any, rows: Sequence[Sequence[float]], *, crosses: bool = True) -> None:
    """Coloured cells, row 0 on top: one path for each colour, so that large maps stay small."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    parts: dict[str, list[Path]] = {}
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            colour = RAMP[sum(value > step for step in STEPS)]
            corners = [(x - 0.46, y - 0.46), (x + 0.46, y - 0.46), (x + 0.46, y + 0.46)]
            corners += [(x - 0.46, y + 0.46), (0.0, 0.0)]
            codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY]
            parts.setdefault(colour, []).append(Path(corners, codes))
            if crosses and value == 0:
                axis.plot([x], [y], "x", color=CARD, markersize=4.5, markeredgewidth=1.6)
    for colour, cells in parts.items():
        axis.add_patch(PathPatch(Path.make_compound_path(*cells), color=colour, linewidth=0))
    axis.set_xlim(-0.5, max(len(row) for row in rows) - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
