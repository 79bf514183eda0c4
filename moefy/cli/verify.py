"""`moefy verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.shared import Json, Quiet, quiet_libraries, show
from moefy.errors import MoefyError


def verify(
    run: Annotated[Path, typer.Argument(help="Folder that `moefy convert` wrote.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that RUN is as it was written, and computes as it did.

    Digests of all files, headers, finite values, and a forward pass through stock transformers
    against the figures of the report. The exit code is 3 for files that were changed and 6 for
    other numbers.
    """
    quiet_libraries()
    from moefy.progress import watching
    from moefy.report import terminal
    from moefy.runs.verify import verify as check

    with watching(quiet=quiet) as watch:
        result = check(run, watch)
    show(result, terminal.show_checks, as_json, quiet)
    if not result["passed"]:
        raise MoefyError(result["checks"][-1]["found"], code=result["code"])
