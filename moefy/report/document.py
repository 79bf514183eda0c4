"""What a report says, before it is Markdown or HTML: sections of text, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row, the others are right-aligned numbers or
    words."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Behind a line to open it, where a page can: for what few will read."""
    on_terminal: bool = True
    """Whether `moefy report` prints it."""


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn only where it is shown; `alt` tells those who cannot see it what it
    shows."""

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]
    scale: tuple[str, str] | None = None
    """The two ends of the scale of colours, for a map."""


@dataclass(frozen=True)
class Voices:
    """What each model, (label, text), writes after the same prompt."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """One question that a report answers."""

    name: str
    title: str
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    voices: tuple[Voices, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pictures or self.tables or self.voices)
