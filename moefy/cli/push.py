"""`moefy push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.shared import Json, Quiet, quiet_libraries, show


def push(
    run: Annotated[Path, typer.Argument(help="Folder that moefy wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Who may see a repository that is made."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to.")] = None,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Upload the calibration tokens, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = (
        False
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload the run RUN to the Hugging Face Hub as REPO.

    Sent are the model, its card, and under moefy/ the recipe and the reports, which hold the
    prompts that were measured and the paths of your folders. Left out are caches, exports and the
    calibration tokens.
    """
    quiet_libraries()
    from moefy.progress import watching
    from moefy.runs.push import push as send

    with watching(quiet=quiet) as watch:
        told = send(
            run,
            repo,
            private=private,
            revision=revision,
            calibration=calibration,
            dry=dry_run,
            watch=watch,
        )
    show(told, _pushed, as_json, quiet)


def _pushed(told: dict[str, Any]) -> None:
    from moefy.report import terminal

    terminal.show_push(told)
