"""Static pruning, the control: keep as many neurons as are to be active, and drop the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moefy.convert.profile import CHUNK, activations
from moefy.types import FFN, Partition, Profile, Shape

ROUTED = False  # it makes no experts: the result is a dense class


def split(
    ffn: FFN,
    profile: Profile,
    shape: Shape,
    *,
    generator: torch.Generator,
    metric: Literal["energy", "fluctuation"] = "energy",
) -> Partition:
    """Keep as many neurons as `shape` has active, all shared; no neuron is routed.

    By "energy" neurons of greatest mean squared output stay, by "fluctuation" those of greatest
    variance of h, times |down column|^2.

    Source: FLAP (arXiv 2312.11983), whose metric is the fluctuation ("WIFV", as many neurons in
    every layer); energy is its uncentred form, in which tokens have the weights of `Profile`. FLAP
    adds the mean output of what it drops as a bias behind `down_proj`. Hardly any dense class here
    has one, and no stock MoE class: it is left out, and the refit makes up for what was dropped.
    """
    score_F = profile.energy_F if metric == "energy" else fluctuation(ffn, profile)
    kept_S = score_F.topk(shape.num_active).indices.sort().values
    return Partition(kept_S, torch.empty((0, 0), dtype=torch.long, device=kept_S.device))


def fluctuation(ffn: FFN, profile: Profile) -> Tensor:
    """Variance of every neuron's activation over the fitting tokens, times |down column|^2, (F)."""
    total_F = torch.zeros(ffn.num_neurons, dtype=torch.float64, device=profile.device)
    squares_F = torch.zeros_like(total_F)

    def add() -> None:
        for first in range(0, profile.num_fit, CHUNK):
            tokens = slice(first, min(first + CHUNK, profile.num_fit))
            h_TF = activations(ffn, profile, tokens) / profile.scale_T[tokens, None]
            total_F.add_(h_TF.double().sum(0))
            squares_F.add_(h_TF.double().square().sum(0))

    profile.group.in_turn(add, total_F, squares_F)
    num_fit = profile.group.total(profile.num_fit)
    variance_F = squares_F / num_fit - (total_F / num_fit).square()
    return variance_F.float() * ffn.down_norm_sq_F
