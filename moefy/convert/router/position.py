"""A term per position, beside the linear router or alone: for moefy's own class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.convert.routed_ffn import RoutedFFN
from moefy.convert.router import linear
from moefy.types import FFN, Partition, Profile, Router, Shape, gram


@dataclass(frozen=True)
class Options(linear.Options):
    """The options of `fit` and `refine`: those of the linear router, and whether it is there."""

    linear: bool = True


DEFAULTS = Options()


def sizes(length: int, *, options: Options = DEFAULTS) -> dict[str, int]:
    """What the configuration of the class says of the router."""
    return {"router_positions": length}


def fit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    *,
    generator: torch.Generator,
    options: Options = DEFAULTS,
) -> Router:
    """Fit a term per position of a calibration sequence as the linear router is, and beside it.

    Terms are linear in the logarithm of the position between 1, 2, 4, ...: a sequence has each
    position once, and free terms would follow its tokens. Positions behind the last calibrated one
    take its term, which is that of half of the sequence: nothing says that the later ones are like
    no position at all, and without the linear router zeros would choose by the experts' order.
    """
    worth_TE = linear.energies(ffn, profile, partition)
    return _fit(profile, worth_TE, shape.experts_per_token, generator, options)


def refine(
    routed: RoutedFFN, profile: Profile, *, generator: torch.Generator, options: Options = DEFAULTS
) -> Router:
    """Fit again to what the experts of a refitted FFN are worth, as the linear router is."""
    return _fit(profile, linear.worths(routed, profile), routed.k, generator, options)


def _fit(
    profile: Profile, worth_TE: Tensor, k: int, generator: torch.Generator, options: Options
) -> Router:
    fit_x_TD, held_x_TD = profile.inputs()
    # Of the length of an input, for one ridge penalises both.
    hat_PJ = _hats(profile.length).to(fit_x_TD) * fit_x_TD.norm(dim=1).mean()
    first = 0 if options.linear else fit_x_TD.shape[1]

    def wide(x_TD: Tensor) -> Tensor:
        hat_TJ = hat_PJ.repeat(len(x_TD) // profile.length, 1)
        return torch.cat([x_TD[:, first:], hat_TJ], 1)

    inputs = wide(fit_x_TD), wide(held_x_TD)
    gram_ZZ = gram(inputs[0], profile.device)
    rows = linear.fit_rows(inputs, gram_ZZ, worth_TE, k, generator, options)
    weight_ED, row_EJ = rows.weight_ED.split([fit_x_TD.shape[1] - first, hat_PJ.shape[1]], 1)
    if first:
        weight_ED = weight_ED.new_zeros(len(row_EJ), first)
    position_PE = hat_PJ.to(row_EJ.device) @ row_EJ.T
    return Router(weight_ED.contiguous(), balance=rows.balance, position_PE=position_PE)


def _hats(length: int) -> Tensor:
    """How much of the term at 1, 2, 4, ... each position has, counted from 1; (P, J).

    >>> _hats(3)[:, :2].tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.4150...]]
    """
    place_P1 = torch.arange(1, length + 1).log2()[:, None]
    knot_J = torch.arange(math.ceil(math.log2(length)) + 1)
    return (1 - (place_P1 - knot_J).abs()).clamp_min(0)
