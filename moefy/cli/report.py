"""`moefy report`."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import typer

from moefy.cli.parameters import Options, command
from moefy.cli.shared import JSON, QUIET, note, quiet_libraries, show
from moefy.config.options import option
from moefy.config.report import Settings, build
from moefy.errors import MoefyError

FAILED = 1
"""Exit code when a condition of `--fail-if` holds."""


@dataclass(frozen=True)
class Report:
    """What `moefy report` takes beside the keys of the table `[report]`."""

    run: Path = option(
        MISSING, "Folder that `moefy convert` or `moefy finetune` wrote.", argument=True
    )
    quick: bool = option(False, "Scores and speed at batch 1 alone, on fewer tokens.")
    full: bool = option(False, "More tokens, longer contexts, all controls refitted.")
    redraw: bool = option(False, "Pages drawn anew from report.json, without measurements.")
    open_page: bool = option(False, "The page in the browser.", flag="open")
    as_json: bool = option(False, JSON)
    quiet: bool = option(False, QUIET)


@command(Settings, Report)
def report(options: Options, asked: Report) -> None:
    """Measure the run RUN against the dense model and the controls: quality, routing and cost."""
    if asked.redraw:
        from moefy.report import redraw, terminal

        result = redraw(asked.run)
        show(result, lambda _: terminal.show_page(asked.run), asked.as_json, asked.quiet)
        if asked.open_page:
            _open(asked.run)
        return
    settings = build({**_effort(asked), **options}, note)
    quiet_libraries()
    from moefy.evaluate.run import evaluate
    from moefy.progress import watching
    from moefy.report import terminal

    with watching(quiet=asked.quiet) as watch:
        result = evaluate(asked.run, settings, watch=watch)
    show(result, lambda _: terminal.show_report(result, asked.run), asked.as_json, asked.quiet)
    if asked.open_page:
        _open(asked.run)
    exit_if_failed(result)


def exit_if_failed(report: dict[str, Any]) -> None:
    """End the command with exit code 1 where a condition of `--fail-if` holds."""
    if report["failed"]:
        print(f"moefy: {'; '.join(report['failed'])}", file=sys.stderr)
        raise typer.Exit(FAILED)


def _effort(asked: Report) -> dict[str, Any]:
    """The settings that --quick and --full stand for."""
    if asked.quick and asked.full:
        raise MoefyError("--quick and --full are given; expected one of them", code=2)
    if asked.full:
        return {"effort": "full", "controls": True}
    return {"effort": "quick"} if asked.quick else {}


def _open(run: Path) -> None:
    import webbrowser

    from moefy.report import HTML

    page = (run / HTML).resolve().as_uri()
    if not webbrowser.open(page):
        raise MoefyError(f"no browser was found; open {page}", code=5)
