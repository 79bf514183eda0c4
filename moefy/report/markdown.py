"""Markdown: what a model or a file says comes out as text, whatever it holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moefy.report.document import Section, Table, Voices

MEANING = re.compile(r"([\\`*_\[\]<>#|~!])")
"""Characters that Markdown gives a meaning to somewhere in a line."""


def escaped(text: object) -> str:
    r"""`text` on one line, so that Markdown shows it as it is.

    >>> print(escaped("a|b\n# <c>"))
    a\|b \# \<c\>
    """
    return MEANING.sub(r"\\\1", " ".join(str(text).split()))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; every column but the first is right-aligned."""
    lines = ["| " + " | ".join(map(escaped, header)) + " |"]
    lines.append("|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|")
    lines += ["| " + " | ".join(map(escaped, row)) + " |" for row in rows]
    return "\n".join(lines)


def section(told: Section) -> str:
    """A section without its pictures, whose numbers the tables and the text hold."""
    parts = [f"## {told.title}", *map(escaped, told.lead)]
    parts += [part for spoken in told.voices for part in _voices(spoken)]
    parts += [part for found in told.tables for part in _table(found)]
    return "\n\n".join(parts)


def _table(found: Table) -> list[str]:
    return [f"**{escaped(found.caption)}**", table(found.header, found.rows)]


def _voices(spoken: Voices) -> list[str]:
    answers = "\n".join(f"- {escaped(label)}: {escaped(text)}" for label, text in spoken.answers)
    return [f"> {escaped(spoken.prompt)}", answers]
