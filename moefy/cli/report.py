"""`moefy report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.shared import Json, Quiet, quiet_libraries, show


def report(
    run: Annotated[Path, typer.Argument(help="Folder that `moefy convert` wrote.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file to evaluate on; may be repeated. (default: Python's own manual)"
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense model to compare with. (default: the run's)")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per text.")] = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Also make and score the controls.")
    ] = True,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Also make and score another method, e.g. `partition=weights refit=false`; "
            "may be repeated."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the converted model RUN with the dense model and with the controls."""
    quiet_libraries()
    from moefy.evaluate.run import evaluate
    from moefy.progress import watching

    with watching(quiet=quiet) as watch:
        found = evaluate(
            run,
            text or [],
            dense=dense,
            num_tokens=tokens,
            length=sequence_length,
            with_controls=controls,
            against=against or [],
            watch=watch,
        )
    show(found, lambda made: _reported(made, run), as_json, quiet)


def _reported(found: dict[str, Any], run: Path) -> None:
    from moefy.report import terminal

    terminal.show_report(found, run)
