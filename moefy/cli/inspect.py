"""`moefy inspect` and `moefy families`: what is known without a conversion."""

from __future__ import annotations

from typing import Annotated

import typer

from moefy.cli.shared import Json, show
from moefy.errors import MoefyError


def inspect(
    path: Annotated[str, typer.Argument(help="Folder, hub id in the cache, or `demo`.")],
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    as_json: Json = False,
) -> None:
    """Show what the checkpoint PATH is, what it can become, and which engines run it.

    For a broken checkpoint it shows what can be read. The exit code is then 3, and 4 for a
    checkpoint that cannot be converted.
    """
    from moefy.inspect import describe, terminal

    result = describe(path, revision=revision)
    show(result, terminal.show_inspection, as_json, quiet=False)
    if problems := result["problems"]:
        raise MoefyError("; ".join(problems), code=result["code"])


def families(as_json: Json = False) -> None:
    """List the dense families that can be converted, and the stock classes that hold them."""
    from moefy.inspect import terminal
    from moefy.inspect.catalogue import catalogue

    show(catalogue(), terminal.show_catalogue, as_json, quiet=False)
