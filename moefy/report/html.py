"""`report.html`: one page that needs no network, no script, and either theme."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from moefy.report import chart
from moefy.report.chart import looks
from moefy.report.document import Picture
from moefy.report.format import shape_text
from moefy.report.sections import labels, sections, subject, tiles, title, verdicts
from moefy.report.templates import template

NO_PICTURES = "pictures left out: matplotlib is not installed; pip install 'moefy[report]'"


def can_draw() -> bool:
    """Whether matplotlib is installed; a page without it has its tables alone."""
    return importlib.util.find_spec("matplotlib") is not None


def report_html(report: Mapping[str, Any]) -> str:
    """The page. The text of a model or a file is escaped."""
    return template("report.html.jinja").render(
        report=report,
        title=title(report),
        shape=report["run"]["shape"],
        shape_text=shape_text(report["run"]),
        subject=subject(report),
        verdicts=verdicts(report),
        tiles=tiles(report),
        sections=sections(report),
        looks=looks(labels(report)),
        theme=chart.THEME,
        glyphs=chart.GLYPHS,
        draw=_drawn if can_draw() else None,
        no_pictures=NO_PICTURES,
        num_steps=len(chart.RAMP),
    )


def _drawn(picture: Picture) -> Any:
    """The picture as markup, in which matplotlib has escaped what is text."""
    from markupsafe import Markup

    return Markup(chart.svg(picture.draw, picture.name, picture.alt))
