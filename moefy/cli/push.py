"""`moefy push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.shared import Json, Quiet, quiet_libraries, show


def push(
    run: Annotated[Path, typer.Argument(help="Folder that moefy wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository."),
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

    It sends the model, its card, and under moefy/ the recipe and the reports. These hold the
    prompts that were measured and the paths of your folders. It leaves out caches, exports and the
    calibration tokens.
    """
    quiet_libraries()
    from moefy.progress import watching
    from moefy.report import terminal
    from moefy.runs.push import push as send

    with watching(quiet=quiet) as watch:
        summary = send(
            run,
            repo,
            private=private,
            revision=revision,
            calibration=calibration,
            dry=dry_run,
            watch=watch,
        )
    show(summary, terminal.show_push, as_json, quiet)
