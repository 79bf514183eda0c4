"""What a report measures, and how much of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefy.compute import AUTO, check_asked
from moefy.errors import MoefyError
from moefy.evaluate.implementations import Grid
from moefy.text.windows import SHORTEST_WINDOW

GRIDS = {
    "quick": Grid(((1, 128),), rounds=3),
    "usual": Grid(((1, 128), (1, 512), (8, 128), (32, 128)), rounds=3),
    "full": Grid(
        ((1, 128), (1, 512), (1, 1536), (8, 128), (8, 512), (32, 128), (32, 512)),
        rounds=5,
        new_tokens=16,
    ),
}
TOKENS = {"quick": 2048, "usual": 4096, "full": 20480}
"""Scored on each text, by effort."""

SHORTEST = 8
"""Tokens of a window at least: fewer tell nothing of a model, and a single one predicts none."""


@dataclass(frozen=True)
class Settings:
    """What to measure of a run."""

    texts: tuple[Path, ...] = ()
    """The standard library's own manual and sources, if none are given."""
    text_field: str = "text"
    """Of rows."""
    dense: str | None = None
    against: tuple[str, ...] = ()
    """Other runs' folders, and methods as `key=value` (see `changed`)."""
    effort: str = "usual"
    """quick, usual or full."""
    num_tokens: int | None = None
    length: int = 1024
    controls: bool | None = None
    """False for none, True for all of them refitted; else those that take little time."""
    tasks: tuple[str, ...] = ()
    include: Path | None = None
    limit: int | None = None
    prompts: Path | None = None
    robustness: bool | None = None
    speed: bool | None = None
    grid: Grid | None = None
    engines: bool | None = None
    """Whether llama.cpp is measured, too: if it is installed, unless told."""
    compute_dtype: str = AUTO
    """What all models are computed in; see `moefy.compute`."""
    conditions: tuple[str, ...] = field(default=())
    """Of `--fail-if`."""

    @property
    def tokens(self) -> int:
        """Scored on each text."""
        return self.num_tokens or TOKENS[self.effort]

    @property
    def work(self) -> Grid:
        """What speed is measured on."""
        return self.grid or GRIDS[self.effort]

    def wants(self, part: bool | None) -> bool:
        """Whether a part is to be measured that a quick report leaves out."""
        return self.effort != "quick" if part is None else part

    def told(self) -> dict[str, Any]:
        """As `report.json` holds them, by which `moefy run` knows what has been measured."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def check(settings: Settings) -> Settings:
    """The settings, whose numbers are in range and whose dtype is known.

    Raises:
        MoefyError: code 2.
    """
    check_asked(settings.compute_dtype)
    for flag, value, least in (
        ("--sequence-length", settings.length, SHORTEST),
        ("--tokens", settings.num_tokens, min(SHORTEST_WINDOW, settings.length)),
        ("--limit", settings.limit, 1),
    ):
        if value is not None and value < least:
            raise MoefyError(f"{flag} is {value}; expected {least} or more", code=2)
    return settings
