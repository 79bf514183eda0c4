"""Weights that change in the course of a training: `1,0@0.7` is 1, and 0 from 70 % of it on."""

from __future__ import annotations

import itertools
import math

from moefy.errors import MoefyError

Weight = float | str
"""A number, or a course as `normal` writes it."""

MOST = 1e30


def parts(weight: Weight) -> list[tuple[float, float]]:
    """The values of a weight, each with the share of the training at which it begins.

    >>> parts("1,0@0.7"), parts(2)
    ([(0.0, 1.0), (0.7, 0.0)], [(0.0, 2.0)])

    Raises:
        ValueError: for what is no such weight.
    """
    first, *others = str(weight).split(",")
    result = [(0.0, float(first))]
    for other in others:
        value, _, share = other.partition("@")
        result.append((float(share), float(value)))
    shares = [share for share, _ in result] + [1.0]
    if not all(before < after for before, after in itertools.pairwise(shares)):
        raise ValueError
    if not all(math.isfinite(value) and 0 <= value <= MOST for _, value in result):
        raise ValueError
    return result


def at(weight: Weight, progress: float) -> float:
    """The value of a weight when that share of the training is done.

    >>> at("1,0@0.7", 0.69), at("1,0@0.7", 0.7)
    (1.0, 0.0)
    """
    return next(value for share, value in reversed(parts(weight)) if share <= progress)


def normal(weight: Weight, name: str) -> Weight:
    """The weight in the one way it is kept, so that equal weights compare equal.

    >>> normal("1.0, 0@.70", "ce"), normal("2", "ce")
    ('1,0@0.7', 2.0)

    Raises:
        MoefyError: code 2, for what is no weight.
    """
    try:
        (_, first), *others = parts(weight)
    except ValueError:
        raise MoefyError(
            f"{name} is {weight}; expected a number from 0, or several, each but the first with "
            "the share of the training at which it begins: 1,0@0.7",
            code=2,
        ) from None
    if not others:
        return first
    return ",".join([_short(first), *(f"{_short(value)}@{_short(at)}" for at, value in others)])


def _short(value: float) -> str:
    return repr(value).removesuffix(".0")
