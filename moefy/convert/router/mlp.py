"""The linear router with a second layer beside it, behind tanh: for moefy's own class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy.convert.ridge import TINY, ridge, scores
from moefy.convert.routed_ffn import RoutedFFN
from moefy.convert.router import linear
from moefy.types import FFN, PIECE, Partition, Profile, Range, Router, Shape, gram, pieces


@dataclass(frozen=True)
class Options(linear.Options):
    """The options of `fit` and `refine`: those of the linear router, and the first layer's."""

    units: Annotated[int, Range(1, 65536)] = 64
    unit_steps: Annotated[int, Range(0, 1e6)] = 300


DEFAULTS = Options()


def sizes(length: int, *, options: Options = DEFAULTS) -> dict[str, int]:
    """What the configuration of the class says of the router."""
    return {"router_units": options.units}


def fit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    *,
    generator: torch.Generator,
    options: Options = DEFAULTS,
) -> Router:
    """Learn tanh units by gradient descent, then take the steps of the linear router with them.

    The scores are those of two layers and of a matrix beside them, which starts as the linear
    router does: learned from nothing, two layers were no better (SmolLM2-135M, layer 12).

    Source: MoEfication (arXiv 2110.01786) has the two layers without the matrix.
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
    hidden, size = fit_x_TD.shape[1], float(fit_x_TD.square().mean().sqrt())
    # Room for the units' answers beside the inputs, of which one rate of learning suits all.
    wide = pad(fit_x_TD / size, (0, options.units)), pad(held_x_TD / size, (0, options.units))
    hidden_HD, start_EZ = _learned(
        (wide[0][:, :hidden], wide[1][:, :hidden]),
        profile.gram_DD / size**2,
        worth_TE,
        generator,
        options,
    )
    for wide_TZ in wide:
        for row_CZ in wide_TZ.split(PIECE):
            x_CD = row_CZ[:, :hidden].to(hidden_HD.device)
            row_CZ[:, hidden:] = (x_CD @ hidden_HD.T).tanh_()
    gram_ZZ = gram(wide[0], profile.device)
    rows = linear.fit_rows(wide, gram_ZZ, worth_TE, k, generator, options, start_EZ)
    weight_ED, output_EH = rows.weight_ED.split([hidden, options.units], 1)
    return Router(
        weight_ED / size,
        balance=rows.balance,
        hidden_HD=hidden_HD / size,
        output_EH=output_EH.contiguous(),
    )


def _learned(
    inputs: tuple[Tensor, Tensor],
    gram_DD: Tensor,
    worth_TE: Tensor,
    generator: torch.Generator,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Units, and rows of inputs and units, that foretell the root of the worth: of those on the
    way from the ridge regression of the linear router, the best on held-out tokens."""
    x_TD, held_x_TD = inputs
    root_TE = worth_TE.sqrt()
    root_TE -= root_TE.mean(1, keepdim=True)
    root_TE /= root_TE.std().clamp_min(TINY)
    fit_TE, held_TE = root_TE.split([len(x_TD), len(held_x_TD)])
    parts = zip(pieces(x_TD, root_TE.device), fit_TE.split(PIECE), strict=True)
    cross_DE = torch.stack([x_CD.T @ root_CE for x_CD, root_CE in parts]).sum(0).double()
    row_DE = ridge(gram_DD, cross_DE, options.strength).float()
    row_EZ = torch.cat([row_DE.T, row_DE.new_zeros(len(row_DE.T), options.units)], 1)
    hidden_HD = torch.randn(options.units, len(row_DE), generator=generator).to(row_DE)
    hidden_HD /= scores(x_TD, hidden_HD).std()
    best, least = (hidden_HD.clone(), row_EZ.clone()), float("inf")
    optimiser = torch.optim.Adam([hidden_HD.requires_grad_(), row_EZ.requires_grad_()], lr=3e-3)

    def error(x_TD: Tensor, root_TE: Tensor) -> Tensor:
        x_TD = x_TD.to(root_TE.device)
        wide_TZ = torch.cat([x_TD, (x_TD @ hidden_HD.T).tanh()], 1)
        return (wide_TZ @ row_EZ.T - root_TE).square().mean()

    for step in range(options.unit_steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                held = float(error(held_x_TD, held_TE))
            if held < least:
                best, least = (hidden_HD.detach().clone(), row_EZ.detach().clone()), held
        pick = torch.randint(len(x_TD), (min(options.batch, len(x_TD)),), generator=generator)
        some_TD = x_TD.index_select(0, pick.to(x_TD.device))
        optimiser.zero_grad()
        error(some_TD, fit_TE.index_select(0, pick.to(fit_TE.device))).backward()
        optimiser.step()
    return best
