"""`moefy run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.report import FAILED
from moefy.cli.shared import Json, Quiet, quiet_libraries, show


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
    """Convert, fine-tune and report, as RECIPE says; what has been done already is skipped.

    The fine-tune, if there is a table [finetune], goes to OUT-finetuned. The table [report] says
    what to measure.
    """
    from moefy.config.recipe import build

    build(recipe, {}, [])  # most mistakes are found here, before anything slow is imported
    quiet_libraries()
    from moefy import pipeline
    from moefy.progress import watching

    declared = pipeline.declared(recipe)
    place = Path(recipe.stem) if out is None else out
    wanted = pipeline.stages(declared, place, force=force)
    made: dict[str, Any] = {}
    with watching(quiet=quiet) as watch:
        for stage, told in pipeline.run(wanted, force=force, watch=watch):
            made[stage.name] = {"folder": str(stage.folder), "skipped": told is None, "told": told}
    show({"stages": made}, _ran, as_json, quiet)
    failed = (made["report"]["told"] or {}).get("failed")
    if failed:
        print(f"moefy: {'; '.join(failed)}", file=sys.stderr)
        raise typer.Exit(FAILED)


def _ran(made: dict[str, Any]) -> None:
    from moefy.report import printed

    printed.show_run(made["stages"])
