"""The sources of a text, each with its share: `prose.txt:0.7`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from moefy.config.options import located
from moefy.errors import MoefyError


@dataclass(frozen=True)
class Source:
    """A file, folder or data set, and its share of the text; the shares add up to one."""

    place: str
    share: float
    prompts: bool = False
    """Whether it holds prompts, whose answers are the text."""

    @property
    def flag(self) -> str:
        """The option that names it."""
        return "--answers" if self.prompts else "--data"


def sources(data: Sequence[str], answers: str | None = None) -> list[Source]:
    """The sources that `data` names, and the prompts of `answers` behind them, with shares as given
    behind a colon, or equal ones.

    Only the ratios of the shares count. What exists as a path is one, whatever its name ends in.

    >>> [(source.place, source.share) for source in sources(["a.txt:3", "b.txt:1"])]
    [('a.txt', 0.75), ('b.txt', 0.25)]

    Raises:
        MoefyError: code 2 for no source, a source that is there twice, a share that is not above
            0, and shares for some sources only.
    """
    split = [_split(text) for text in [*data, *([] if answers is None else [answers])]]
    if not split or not all(place for place, _ in split):
        flag = "--answers" if answers == "" else "--data"
        raise MoefyError(f"{flag} is empty; expected a file, a folder or a data set", code=2)
    flags = ["--data"] * len(data) + ["--answers"]
    places = [place for place, _ in split]
    if twice := [place for number, place in enumerate(places) if place in places[:number]]:
        raise MoefyError(f"--data names {twice[0]} twice; expected each source once", code=2)
    numbers = []
    for flag, (place, share) in zip(flags, split, strict=False):
        if not share and any(other for _, other in split):
            raise MoefyError(
                f"{flag} {place} has no share, and others have; expected shares for all sources, "
                f"like {place}:0.5, or for none",
                code=2,
            )
        numbers.append(float(share or 1))
        if not 0 < numbers[-1] < math.inf:
            raise MoefyError(
                f"{flag} {place}: its share is {share}; expected a number above 0, like 0.5", code=2
            )
    return [
        Source(place, number / sum(numbers), prompts=flag == "--answers")
        for flag, place, number in zip(flags, places, numbers, strict=False)
    ]


def absolute(data: Sequence[str]) -> tuple[str, ...]:
    """`data`, where sources that are files or folders are absolute paths."""
    result = []
    for text in data:
        place, share = _split(text)
        place = located({"data": place}, "data")["data"]
        result.append(f"{place}:{share}" if share else place)
    return tuple(result)


def _split(text: str) -> tuple[str, str]:
    """A source and its share as it is written; empty without one."""
    place, colon, share = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return text, ""
    try:
        float(share)
    except ValueError:  # the split of a data set, or a part of a path
        return text, ""
    return place, share
