"""`moefy run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.report import exit_if_failed
from moefy.cli.shared import Json, Quiet, note, quiet_libraries, show
from moefy.config.recipe import build


def run(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see recipes/.")],
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write. (default: the recipe's name)")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Do all stages anew, replacing OUT if it exists.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert, fine-tune and report as RECIPE says; skip what has been done already.

    A fine-tune, where RECIPE has a table [finetune], goes to OUT-finetuned. The table [report] says
    what to measure.
    """
    build(recipe, {}, [])  # most mistakes are found here, before anything slow is imported
    quiet_libraries()
    from moefy import pipeline
    from moefy.progress import watching
    from moefy.report import terminal

    declared = pipeline.declared(recipe, note)
    folder = Path(recipe.stem) if out is None else out
    stages = pipeline.stages(declared, folder, force=force)
    results: dict[str, Any] = {}
    with watching(quiet=quiet) as watch:
        for stage, result in pipeline.run(stages, force=force, watch=watch):
            results[stage.name] = {
                "folder": str(stage.folder),
                "skipped": result is None,
                "told": result,
            }
    show({"stages": results}, lambda _: terminal.show_run(results), as_json, quiet)
    if report := results["report"]["told"]:
        exit_if_failed(report)
