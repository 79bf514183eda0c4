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


def sources(data: Sequence[str]) -> list[Source]:
    """The sources that `data` names, with shares as given behind a colon, or equal ones.

    Only the ratios of the shares count. What exists as a path is one, whatever its name ends in.

    >>> sources(["a.txt:3", "b.txt:1"])
    [Source(place='a.txt', share=0.75), Source(place='b.txt', share=0.25)]
    >>> sources(["owner/set:train"])
    [Source(place='owner/set:train', share=1.0)]

    Raises:
        MoefyError: code 2 for no source, a source that is there twice, a share that is not above
            0, and shares for some sources only.
    """
    places, shares = zip(*map(_split, data), strict=True) if data else ((), ())
    if not places or not all(places):
        raise MoefyError("--data is empty; expected a file, a folder, a data set or `self`", code=2)
    if twice := [place for number, place in enumerate(places) if place in places[:number]]:
        raise MoefyError(f"--data names {twice[0]} twice; expected each source once", code=2)
    if any(shares) and not all(shares):
        without = places[shares.index("")]
        raise MoefyError(
            f"--data {without} has no share, and others have; expected shares for all sources, "
            f"like {without}:0.5, or for none",
            code=2,
        )
    numbers = [
        _number(share, place) if share else 1.0 for place, share in zip(places, shares, strict=True)
    ]
    return [Source(p, n / sum(numbers)) for p, n in zip(places, numbers, strict=True)]


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


def _number(share: str, place: str) -> float:
    number = float(share)
    if not 0 < number < math.inf:
        raise MoefyError(
            f"--data {place}: its share is {share}; expected a number above 0, like 0.5", code=2
        )
    return number
