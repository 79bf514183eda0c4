"""From `report.json` to every page that is drawn from it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError
from moefy.files.publish import write_text
from moefy.report.card import model_card
from moefy.report.html import report_html
from moefy.report.pages import report_page

FORMAT = 2
"""Of `report.json`."""

LISTS = ("prompts", "generation", "frontier", "advice", "not_run", "notes")
TABLES = (
    "runs", "models", "texts", "seen_in_calibration", "robustness", "benchmarks", "behaviour",
    "lost_experts", "quantized", "routing", "speed", "finetune", "rivals",
)  # fmt: skip
"""Parts that may be absent from a report."""

HTML = "moefy/report.html"


def draw(report: Mapping[str, Any]) -> dict[str, str]:
    """The pages of a report, by their paths in the run folder.

    Raises:
        MoefyError: as `filled`.
    """
    report = filled(report)
    return {
        "moefy/report.md": report_page(report),
        HTML: report_html(report),
        "README.md": model_card(report["run"], report),
    }


def filled(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with every part; absent ones are empty.

    Raises:
        MoefyError: code 7 for a report of another format.
    """
    version = report.get("format", 1)
    if version != FORMAT:
        raise MoefyError(
            f"report.json has format {version}; expected {FORMAT}; measure again: moefy report RUN",
            code=7,
        )
    absent = {key: [] for key in LISTS} | {key: {} for key in TABLES}
    return {**absent, **report}


def read_report(run: Path) -> dict[str, Any]:
    """The `report.json` of a run.

    Raises:
        MoefyError: code 3 if there is none, 7 if it is not JSON.
    """
    file = run / "moefy" / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise MoefyError(
            f"{file} does not exist; measure the run first: moefy report {run}"
        ) from None
    except ValueError:
        raise MoefyError(f"{file} is not JSON; measure again: moefy report {run}", code=7) from None
    return report


@contextlib.contextmanager
def readable(run: Path) -> Iterator[None]:
    """Raise code 7 when the block cannot draw a page from the `report.json` of a run."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise MoefyError(
            f"{run / 'moefy' / 'report.json'} is not as moefy writes it ({type(error).__name__}: "
            f"{error}); measure again: moefy report {run}",
            code=7,
        ) from error


def redraw(run: Path) -> dict[str, Any]:
    """The report of a run, after its pages were drawn again from `report.json`.

    Raises:
        MoefyError: code 3 if there is none, 7 if it is broken or has another format.
    """
    report = read_report(run)
    with readable(run):
        for name, text in draw(report).items():
            write_text(run / name, text)
    return report
