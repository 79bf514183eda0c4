"""What the commands have in common."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from moefy.config.options import Option

JSON = Option("Result as JSON on standard output.", flag="json")
QUIET = Option("No progress, no summary.")
FORCE = Option("Replace OUT, and another run that was stopped there.")
RESTART = Option("Start over where a stopped run could go on.")
SETTINGS = Option("Any key of a recipe as key=value; may be repeated.", flag="set")
"""Options of the commands that `moefy.cli.parameters` makes, and below of the others."""

Json = Annotated[bool, typer.Option("--json", help=JSON.help)]
Quiet = Annotated[bool, typer.Option("--quiet", help=QUIET.help)]


def show(
    value: dict[str, Any], text: Callable[[dict[str, Any]], None], as_json: bool, quiet: bool
) -> None:
    """Print a result as JSON, or in words by `text`, or not at all; one process of several does."""
    if not first():
        return
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
    elif not quiet:
        text(value)


def first() -> bool:
    """Whether this is the one of several processes that prints."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def note(line: str) -> None:
    """Tell the user something that stops nothing, on standard error."""
    print(f"moefy: {line}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep the libraries quiet: what they print at import and load is not for the user."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # transformers imports torchao where it is installed, which says what it finds no GPU for.
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
