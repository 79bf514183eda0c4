"""Even out how many tokens each expert gets, without training."""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.convert.ridge import ridge, scores
from moefy.convert.routed_ffn import top_mask
from moefy.types import pieces

STEPS = 200  # steps of the descent on the biases

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the biases that are tried; the smallest share that evens out the load is used."""


def balance(
    weight_ED: Tensor, x_TD: Tensor, worth_TE: Tensor, k: int, most_cv: float, gram_DD: Tensor
) -> tuple[Tensor, list[dict[str, float]]]:
    """Rows under which the load's coefficient of variation over `x_TD` is at most `most_cv`.

    `gram_DD` is X'X in float64.

    A stock router has no bias, but its inputs have a mean: with m the ridge solution of x m = 1,
    rows w_e + b_e m score as w_e with bias b_e. The biases are lowered where experts have too many
    tokens and raised where they have too few; then only the least share of them is used that is
    enough, or all where none is. Also gives, per share tried, the load's coefficient of variation
    and the worth that is still captured, relative to that of no bias.

    Source: the biases of auxiliary-loss-free balancing (arXiv 2408.15664), found before any
    training and folded into the rows.
    """
    first, *more = (x_CD.sum(0, keepdim=True) for x_CD in pieces(x_TD, weight_ED.device))
    one_D = ridge(gram_DD, sum(more, first.double()).T, 1e-3)[:, 0].float()
    unit_T1 = torch.cat([x_CD @ one_D for x_CD in pieces(x_TD, one_D.device)])[:, None]
    score_TE = scores(x_TD, weight_ED)
    mask_TE = top_mask(score_TE, k)
    full = float((worth_TE * mask_TE).sum())
    bias_E, step = torch.zeros_like(score_TE[0]), float(score_TE.std())
    best_E, least = bias_E, _cv(mask_TE)
    for turn in range(STEPS):
        if least <= 0.5 * most_cv:
            break
        bias_E = bias_E - step / (2 + turn) * (mask_TE.mean(0) * len(bias_E) / k - 1)
        mask_TE = top_mask(score_TE + unit_T1 * bias_E, k)
        if (load_cv := _cv(mask_TE)) < least:
            best_E, least = bias_E, load_cv
    curve = []
    for share in SHARES:
        mask_TE = top_mask(score_TE + unit_T1 * (share * best_E), k)
        captured = float((worth_TE * mask_TE).sum()) / max(full, 1e-30)
        curve.append({"share": share, "load_cv": _cv(mask_TE), "worth": captured})
    enough = next((point["share"] for point in curve if point["load_cv"] <= most_cv), SHARES[-1])
    return weight_ED + enough * best_E[:, None] * one_D, curve


def _cv(mask_TE: Tensor) -> float:
    """The load's coefficient of variation over the experts."""
    load_E = mask_TE.sum(0)
    return float(load_E.std(correction=0) / load_E.mean())
