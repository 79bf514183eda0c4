"""`moefy report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.shared import Json, Quiet, quiet_libraries, show
from moefy.errors import MoefyError

FAILED = 1
"""Exit code when a condition of `--fail-if` holds."""


def report(
    run: Annotated[
        Path, typer.Argument(help="Folder that `moefy convert` or `moefy finetune` wrote.")
    ],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of text, JSON or parquet rows, or chats to evaluate on; may be repeated. "
            "(default: Python's own manual)"
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the rows of --text.")] = "text",
    dense: Annotated[
        str | None, typer.Option(help="Dense model to compare with. (default: the run's)")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Another run's folder; or another method, made and scored, e.g. "
            "`partition=weights refit=false`; may be repeated."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Scores and speed at batch 1 alone, on fewer tokens.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="More tokens, longer contexts, all controls refitted.")
    ] = False,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens per text. (default: 4096; 2048 quick, 20480 full)")
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    controls: Annotated[
        bool | None,
        typer.Option(
            "--controls/--no-controls",
            help="Make all controls anew and refit them, which takes as long as the conversion "
            "for each; or score none. (default: static, and an oracle that is not refitted)",
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, joined by commas, e.g. `piqa,arc_easy`.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own, for --tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples per task at most.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of rows with a `prompt`, and an `answer` or none, or of chats, to find "
            "regressions."
        ),
    ] = None,
    robustness: Annotated[
        bool | None,
        typer.Option(
            "--robustness/--no-robustness",
            help="Score random tokens, cut-off prompts and long contexts. (default: unless quick)",
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Measure tokens per second.")
    ] = True,
    engines: Annotated[
        bool | None,
        typer.Option(
            "--llama-cpp/--no-llama-cpp",
            help="Measure speed in llama.cpp, too. (default: if installed, unless quick)",
        ),
    ] = None,
    compute_dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16 to compute all models in. (auto: as stored, "
            "but float32 where the processor lacks that)"
        ),
    ] = "auto",
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with code 1 if this holds, e.g. `dnll>0.1 or dead>0`; may be repeated."
        ),
    ] = None,
    redraw: Annotated[
        bool,
        typer.Option("--redraw", help="Measure nothing: draw the pages from report.json anew."),
    ] = False,
    open_page: Annotated[
        bool, typer.Option("--open", help="Show the page in the browser.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the run RUN against the dense model and the controls: quality, routing and cost."""
    if redraw:
        _redrawn(run, open_page, as_json, quiet)
        return
    if quick and full:
        raise MoefyError("--quick and --full are given; expected one of them", code=2)
    quiet_libraries()
    from moefy.evaluate.run import evaluate
    from moefy.evaluate.settings import Settings
    from moefy.progress import watching

    settings = Settings(
        texts=tuple(text or ()),
        text_field=text_field,
        dense=dense,
        against=tuple(against or ()),
        effort="quick" if quick else "full" if full else "usual",
        num_tokens=tokens,
        length=sequence_length,
        controls=True if full and controls is None else controls,
        tasks=tuple(filter(None, (tasks or "").split(","))),
        include=include_path,
        limit=limit,
        prompts=prompts,
        robustness=robustness,
        speed=speed,
        engines=engines,
        compute_dtype=compute_dtype,
        conditions=tuple(fail_if or ()),
    )
    with watching(quiet=quiet) as watch:
        found = evaluate(run, settings, watch=watch)
    show(found, lambda made: _reported(made, run), as_json, quiet)
    if open_page:
        _open(run)
    if found["failed"]:
        print(f"moefy: {'; '.join(found['failed'])}", file=sys.stderr)
        raise typer.Exit(FAILED)


def _redrawn(run: Path, open_page: bool, as_json: bool, quiet: bool) -> None:
    from moefy import report

    found = report.redraw(run)
    show(found, lambda made: _drawn(run), as_json, quiet)
    if open_page:
        _open(run)


def _drawn(run: Path) -> None:
    from moefy.report import printed

    printed.show_page(run)


def _open(run: Path) -> None:
    import webbrowser

    from moefy.report import HTML

    page = (run / HTML).resolve().as_uri()
    if not webbrowser.open(page):
        raise MoefyError(f"no browser was found; open {page}", code=5)


def _reported(found: dict[str, Any], run: Path) -> None:
    from moefy.report import printed

    printed.show_report(found, run)
