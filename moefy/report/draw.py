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
from moefy.report.pages import report_page
from moefy.report.web import report_html

FORMAT = 2
"""Of `report.json`."""

LISTS = ("prompts", "generation", "frontier", "advice", "not_run", "notes")
TABLES = (
    "runs", "models", "texts", "seen_in_calibration", "robustness", "benchmarks", "routing",
    "speed", "finetune",
)  # fmt: skip
"""The parts that a report may lack."""

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
    """A report with every part, those empty that it lacks.

    Raises:
        MoefyError: code 7 for a report of another format.
    """
    found = report.get("format", 1)
    if found != FORMAT:
        raise MoefyError(
            f"report.json is of format {found}; expected {FORMAT}; measure again: moefy report RUN",
            code=7,
        )
    absent = {key: [] for key in LISTS} | {key: {} for key in TABLES}
    return {**absent, **report}


def write(run: Path, report: Mapping[str, Any]) -> None:
    """Draw the pages of a report into its run folder."""
    for name, text in draw(report).items():
        write_text(run / name, text)


def read_report(run: Path) -> dict[str, Any]:
    """What the `report.json` of a run holds.

    Raises:
        MoefyError: code 3 where there is none, 7 where it is no JSON.
    """
    file = run / "moefy" / "report.json"
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise MoefyError(
            f"{file} is not there; expected a run that was measured: moefy report {run}"
        ) from None
    except ValueError:
        raise MoefyError(f"{file} is not JSON; measure again: moefy report {run}", code=7) from None
    return report


@contextlib.contextmanager
def readable(run: Path) -> Iterator[None]:
    """Refuse, with code 7, a `report.json` that a page cannot be drawn from in the block."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise MoefyError(
            f"{run / 'moefy' / 'report.json'} is not as moefy writes it ({type(error).__name__}: "
            f"{error}); measure again: moefy report {run}",
            code=7,
        ) from error


def redraw(run: Path) -> dict[str, Any]:
    """Draw the pages of a run anew from its `report.json`, and give what that holds.

    Raises:
        MoefyError: code 3 where there is none, 7 where it is broken or of another format.
    """
    report = read_report(run)
    with readable(run):
        write(run, report)
    return report
