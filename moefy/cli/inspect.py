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
    """Tell what the checkpoint PATH is, what can become of it, and which engines run it.

    Where something is wrong with it, tells as well what can be read. The exit code is 3 for a
    broken checkpoint and 4 for one that cannot be converted.
    """
    from moefy.inspect import describe, terminal

    found = describe(path, revision=revision)
    show(found, terminal.show_inspection, as_json, quiet=False)
    if problems := found["problems"]:
        raise MoefyError("; ".join(problems), code=found["code"])


def families(as_json: Json = False) -> None:
    """List the dense families that can be converted, and the stock classes that hold them."""
    from moefy.inspect import terminal
    from moefy.inspect.catalogue import catalogue

    show(catalogue(), terminal.show_catalogue, as_json, quiet=False)
