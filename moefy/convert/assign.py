"""Balanced assignment: every column of a value matrix receives the same number of rows.

This is a transportation problem. Solved as a square assignment it takes minutes at 11,008
neurons; with one dual price per expert it takes well under a second.
"""

from __future__ import annotations

import numpy as np


def assign_balanced(value_FE: np.ndarray, width: int) -> np.ndarray:
    """Give each of the E columns exactly `width` rows so that the summed value is greatest.

    `value_FE` has F = E * `width` rows. Returns the column of each row, int64, shape (F,). The
    result is optimal; ties break by index.

    Each row first takes its best column under prices that a short dual descent has set, which is
    optimal for the column counts it yields. Then rows move one at a time along the cheapest path
    from a column with too many rows to one with too few, which keeps it optimal.

    Source: successive shortest paths for min-cost flow (Ahuja, Magnanti, Orlin, 1993, ch. 9).
    Cost: O(F * E) memory, O(F * E) per price step, O(E^2 + F) per moved row.
    """
    value_FE = np.ascontiguousarray(value_FE, dtype=np.float64)
    num_rows, num_columns = value_FE.shape
    assert num_rows == num_columns * width, "rows must be columns x width"
    if num_columns == 1:
        return np.zeros(num_rows, dtype=np.int64)
    value_FE = value_FE - _prices(value_FE, width)
    column_F = value_FE.argmax(1)
    counts_E = np.bincount(column_F, minlength=num_columns)
    cost_EE = np.stack([_leave_costs(value_FE, column_F, e) for e in range(num_columns)])
    price_E = np.zeros(num_columns)
    while (counts_E > width).any():
        # At these prices no move gains. Rounding must not make one seem to: a path would circle.
        priced_EE = np.maximum(cost_EE + price_E[:, None] - price_E, 0.0)
        path, distance_E = cheapest_path(priced_EE, counts_E > width, counts_E < width)
        price_E += np.minimum(distance_E, distance_E[path[-1]])
        for source, sink in zip(path[:-1], path[1:], strict=True):
            rows = np.flatnonzero(column_F == source)
            row = rows[(value_FE[rows, source] - value_FE[rows, sink]).argmin()]
            column_F[row] = sink
            cost_EE[source] = _leave_costs(value_FE, column_F, source)
            cost_EE[sink] = _leave_costs(value_FE, column_F, sink)
        counts_E[path[0]] -= 1
        counts_E[path[-1]] += 1
    return column_F


def _prices(value_FE: np.ndarray, width: int, steps: int = 200) -> np.ndarray:
    """Prices per column under which the best columns of the rows are nearly balanced."""
    price_E = np.zeros(value_FE.shape[1])
    best_E, least = price_E, np.inf
    step = np.ptp(value_FE, axis=1).mean() or 1.0
    for turn in range(steps):
        counts_E = np.bincount((value_FE - price_E).argmax(1), minlength=len(price_E))
        excess = np.abs(counts_E - width).sum()
        if excess < least:
            best_E, least = price_E, excess
        if excess == 0:
            break
        price_E = price_E + step / (1 + turn) * (counts_E - width) / width
    return best_E


def _leave_costs(value_FE: np.ndarray, column_F: np.ndarray, source: int) -> np.ndarray:
    """Least value lost by moving one row of `source` to each other column."""
    rows = np.flatnonzero(column_F == source)
    if not len(rows):
        return np.full(value_FE.shape[1], np.inf)
    cost_E = (value_FE[rows, source, None] - value_FE[rows]).min(0)
    cost_E[source] = 0.0
    return cost_E


def cheapest_path(
    cost_EE: np.ndarray, full_E: np.ndarray, free_E: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Columns along the cheapest path from any full to any free one, and the distance of each.

    Bellman-Ford; no cost is negative.
    """
    distance_E = np.where(full_E, 0.0, np.inf)
    parent_E = np.full(len(distance_E), -1)
    for _ in range(len(distance_E)):
        through_EE = distance_E[:, None] + cost_EE
        nearest_E = through_EE.argmin(0)
        shorter_E = through_EE.min(0) < distance_E
        if not shorter_E.any():
            break
        distance_E = np.where(shorter_E, through_EE.min(0), distance_E)
        parent_E = np.where(shorter_E, nearest_E, parent_E)
    path = [int(np.where(free_E, distance_E, np.inf).argmin())]
    while parent_E[path[-1]] >= 0:
        path.append(int(parent_E[path[-1]]))
    return path[::-1], distance_E
