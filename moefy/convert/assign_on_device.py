"""Balanced assignment of rows that lie on a GPU and stay there."""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.convert.assign import assign_balanced, cheapest_path

STEPS = 64
"""Most steps of the search for prices."""

SLACK = 1e-4
"""What a row may lose more than the row that loses least, to be moved together with it.

In parts of the mean difference between a row's largest and smallest value.
"""


def assign(value_FE: Tensor, width: int) -> Tensor:
    """Give each of the E columns exactly `width` rows so that the summed value is greatest.

    Returns the column of each row, shape (F,): by `assign_balanced`, but for values on a GPU.
    """
    if value_FE.is_cuda:
        return assign_on_device(value_FE, width)
    return torch.as_tensor(assign_balanced(value_FE.numpy(), width))


def assign_on_device(value_FE: Tensor, width: int) -> Tensor:
    """Give each of the E columns exactly `width` rows so that the summed value is nearly greatest.

    Returns the column of each row, int64, shape (F,). The same values give the same columns.

    Each row first takes its best column under prices that nearly balance the columns. Rows then
    move along cheapest paths as in `assign_balanced`. All rows that lose nearly the same move at
    once: where many are equal, prices cannot divide them.

    Source: the prices are those of an auction (Bertsekas, 1988), but a column sets one price for
    all its places. Energies of SmolLM2-135M's neurons always got the optimum
    (recipes/results/assignment.md).
    Cost: O(F * E) memory and operations per price step and per path.
    """
    num_columns = value_FE.shape[1]
    value_EF = value_FE.T.double().contiguous()
    slack = SLACK * float((value_EF.amax(0) - value_EF.amin(0)).mean())
    value_EF = value_EF - _prices(value_EF, width)
    column_F = value_EF.argmax(0)
    counts_E = torch.bincount(column_F, minlength=num_columns).cpu().numpy()
    price_E = 0.0 * counts_E
    while (counts_E > width).any():
        loss_EF = value_EF.gather(0, column_F[None]) - value_EF
        least_EE = loss_EF.new_full((num_columns, num_columns), torch.inf)
        least_EE.scatter_reduce_(1, column_F.expand_as(loss_EF), loss_EF, "amin")
        cost_EE = least_EE.T.cpu().numpy()
        # At these prices no move gains. Rounding must not make one seem to: a path would circle.
        priced_EE = (cost_EE + price_E[:, None] - price_E).clip(min=0.0)
        path, distance_E = cheapest_path(priced_EE, counts_E > width, counts_E < width)
        price_E += distance_E.clip(max=distance_E[path[-1]])
        moves = list(zip(path[:-1], path[1:], strict=True))
        count = min(counts_E[path[0]] - width, width - counts_E[path[-1]])
        for source, sink in moves:
            cheap_F = (column_F == source) & (loss_EF[sink] <= cost_EE[source, sink] + slack)
            count = min(count, int(cheap_F.sum()))
        for source, sink in moves:
            loss_F = (value_EF[source] - value_EF[sink]).masked_fill(column_F != source, torch.inf)
            column_F[loss_F.argsort(stable=True)[:count]] = sink
        counts_E[path[0]] -= count
        counts_E[path[-1]] += count
    return column_F


def _prices(value_EF: Tensor, width: int) -> Tensor:
    """Prices (E, 1) under which the best columns of the rows are nearly balanced.

    A step moves each price halfway to where `width` rows would prefer the column if no other price
    changed. There the last of them gains by the column, and the next row would lose.
    """
    num_columns, num_rows = value_EF.shape
    price_E1 = best_E1 = value_EF.new_zeros(num_columns, 1)
    least = 2 * num_rows
    for _ in range(STEPS):
        gain_EF = value_EF - price_E1
        most_F, column_F = gain_EF.max(0)
        counts_E = torch.bincount(column_F, minlength=num_columns)
        if (excess := int((counts_E - width).abs().sum())) < least:
            best_E1, least = price_E1, excess
        if not least:
            break
        # What a row gains by a column beside the best other one.
        other_F = gain_EF.scatter(0, column_F[None], -torch.inf).amax(0)
        gain_EF -= most_F
        gain_EF.scatter_(0, column_F[None], (most_F - other_F)[None])
        last_E1, next_E1 = (
            gain_EF.kthvalue(num_rows - count, dim=1, keepdim=True).values
            for count in (width - 1, width)
        )
        price_E1 = price_E1 + (last_E1 + next_E1) / 4
    return best_E1
