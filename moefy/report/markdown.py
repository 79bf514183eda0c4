"""Markdown, in which the text of a model or a file has no meaning of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence

from moefy.report.document import Section, Voices

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


def section(content: Section) -> str:
    """A section without its pictures; the tables and the text hold their numbers."""
    parts = [f"## {content.title}", *map(escaped, content.lead)]
    parts += [part for voices in content.voices for part in _voices(voices)]
    for one in content.tables:
        parts += [f"**{escaped(one.caption)}**", table(one.header, one.rows)]
    return "\n\n".join(parts)


def _voices(voices: Voices) -> list[str]:
    answers = "\n".join(f"- {escaped(label)}: {escaped(text)}" for label, text in voices.answers)
    return [f"> {escaped(voices.prompt)}", answers]
