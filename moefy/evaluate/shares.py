"""Shares of prompts, and their differences between two models, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy import stats


def share(values: Sequence[bool], dense: Sequence[bool]) -> dict[str, Any]:
    """The share of `values` that are true, and how far it lies above that of the dense model.

    Both hold one value for each prompt, in the same order. `low` and `high` end Wilson's interval
    of the share; `difference_low` and `difference_high` that of `paired_interval`.
    """
    count, low, high = _wilson(values)
    difference_low, difference_high = paired_interval(values, dense)
    return {
        "count": count,
        "of": len(values),
        "share": count / len(values),
        "low": low,
        "high": high,
        "difference": (count - sum(dense)) / len(values),
        "difference_low": difference_low,
        "difference_high": difference_high,
    }


def paired_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """The 95 % interval of the share of `first` minus that of `second`, paired by prompt.

    A bootstrap has no width where all pairs agree, as few prompts often do. This interval has one.

    Source: Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10: Wilson's intervals
    of both shares, joined by the correlation of the pairs, with its correction for continuity.
    """
    size = len(first)
    (count, low, high), (other, other_low, other_high) = _wilson(first), _wilson(second)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    # both * neither - (first only) * (second only)
    excess = size * both - count * other
    excess = min(excess, 0) + max(excess - size / 2, 0)
    spread = math.sqrt(count * (size - count) * other * (size - other))
    phi = excess / spread if spread else 0.0
    p, q = count / size, other / size

    def length(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p - q - length(p - low, other_high - q), p - q + length(high - p, q - other_low)


def _wilson(values: Sequence[bool]) -> tuple[int, float, float]:
    """How many are true, and Wilson's interval of their share."""
    count = sum(map(bool, values))
    interval = stats.binomtest(count, len(values)).proportion_ci(method="wilson")
    return count, float(interval.low), float(interval.high)
