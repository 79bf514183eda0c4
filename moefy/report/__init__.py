"""Pages drawn from the JSON that a run writes, and from nothing else."""

from moefy.report.card import model_card
from moefy.report.draw import FORMAT, HTML, draw, filled, read_report, readable, redraw, write
from moefy.report.format import shape_text
from moefy.report.pages import conversion_page, report_page
from moefy.report.section_quality import seen_warnings

__all__ = [
    "FORMAT",
    "HTML",
    "conversion_page",
    "draw",
    "filled",
    "model_card",
    "read_report",
    "readable",
    "redraw",
    "report_page",
    "seen_warnings",
    "shape_text",
    "write",
]
