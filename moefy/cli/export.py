"""`moefy export`: one command a format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.shared import Json, Quiet, quiet_libraries, show


def gguf(
    run: Annotated[Path, typer.Argument(help="Folder that `moefy convert` wrote.")],
    out: Annotated[
        Path | None, typer.Argument(help="File to write. (default: RUN/<name>-<type>.gguf)")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="f32, f16, bf16, q8_0, q4_0, q4_k_m, ... (default: as stored)"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model in RUN as one GGUF file OUT, for llama.cpp."""
    quiet_libraries()
    from moefy.progress import watching
    from moefy.report import terminal
    from moefy.runs.folder import read_report
    from moefy.runs.gguf import export

    read_report(run)  # `export` itself takes any model: reports measure the dense one by it
    with watching(quiet=quiet) as watch:
        result = export(run, out, quantize, force=force, watch=watch)
    show(result, terminal.show_export, as_json, quiet)
