"""Pages drawn from the JSON that a run writes, and from nothing else."""

from moefy.report.card import model_card
from moefy.report.draw import HTML, draw, filled, read_report, readable, redraw
from moefy.report.pages import conversion_page

__all__ = [
    "HTML",
    "conversion_page",
    "draw",
    "filled",
    "model_card",
    "read_report",
    "readable",
    "redraw",
]
