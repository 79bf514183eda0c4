"""A report before it is Markdown or HTML: sections of text, tables and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the row; the others are right-aligned."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    """Whether the HTML page hides it behind a line that opens it."""
    on_terminal: bool = True
    """Whether `moefy report` prints it."""


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn only where it is shown; `alt` describes it for screen readers."""

    name: str
    title: str
    alt: str
    draw: Callable[[], Figure]
    scale: tuple[str, str] | None = None
    """The two ends of the scale of colours, for a map."""


@dataclass(frozen=True)
class Voices:
    """The texts that the models write after one prompt, as (label, text)."""

    prompt: str
    answers: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Section:
    """One part of a report."""

    name: str
    title: str
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    voices: tuple[Voices, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.pictures or self.tables or self.voices)
