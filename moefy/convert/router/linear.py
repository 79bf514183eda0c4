"""Our router: linear, fitted to how much output energy each expert has on each token."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import torch
from torch import Tensor

from moefy.convert.balance import balance
from moefy.convert.profile import expert_energies, gains, top_mask
from moefy.convert.ridge import scorer
from moefy.types import FFN, Partition, Profile, Range, Router, Shape


def fit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    *,
    generator: torch.Generator,
    strength: Annotated[float, Range(1e-9)] = 1e-2,
    steps: Annotated[int, Range(0, 1e6)] = 100,
    batch: Annotated[int, Range(1)] = 2048,
    learning_rate: Annotated[float, Range(1e-9, 1e3)] = 1e-2,
    load_cv: Annotated[float, Range(0)] = 0.25,
) -> Router:
    """Fit by ridge regression, then take `steps` of ascent on the captured energy itself.

    The load of the experts is then evened out (see `balance`) until its coefficient of variation is
    at most `load_cv`; 0 leaves it as it is.

    The steps maximise the energy of a soft top-k choice (sigmoids around the k-th score). They
    are judged on the held-out tokens by the energy that the hard choice captures, and the rows
    that captured most are returned: the closed form, if no step improved on it.
    """
    worth_TE = profile.group.gather(expert_energies(ffn, profile, partition, "all"))
    router = _fit(profile, worth_TE, shape, generator, strength, steps, batch, learning_rate)
    return _balanced(router, profile, worth_TE, shape, load_cv)


def refine(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    router: Router,
    *,
    generator: torch.Generator,
    strength: Annotated[float, Range(1e-9)] = 1e-2,
    steps: Annotated[int, Range(0, 1e6)] = 100,
    batch: Annotated[int, Range(1)] = 2048,
    learning_rate: Annotated[float, Range(1e-9, 1e3)] = 1e-2,
    load_cv: Annotated[float, Range(0)] = 0.25,
) -> Router:
    """Fit again, to what the experts of a refitted `ffn` are worth beside those `router` chooses.

    The worth of an expert on a token is the squared error that it takes away (`gains`). Energies
    know neither what the refit has made up for nor what the experts of a token say alike.
    """
    worth_TE = gains(ffn, profile, partition, router, shape.experts_per_token)
    worth_TE = profile.group.gather(worth_TE)
    worth_TE -= worth_TE.min(1, keepdim=True).values  # only differences decide
    router = _fit(profile, worth_TE, shape, generator, strength, steps, batch, learning_rate)
    return _balanced(router, profile, worth_TE, shape, load_cv)


def _fit(
    profile: Profile,
    worth_TE: Tensor,
    shape: Shape,
    generator: torch.Generator,
    strength: float,
    steps: int,
    batch: int,
    learning_rate: float,
) -> Router:
    """Rows whose k highest scores have most of the worth, which is at least zero."""
    x_TD, held_x_TD = profile.inputs()
    energy_TE, held_energy_TE = worth_TE[: len(x_TD)], worth_TE[len(x_TD) :]
    weight_ED = scorer(x_TD, strength)(energy_TE)
    if steps == 0 or shape.experts_per_token == shape.num_experts:
        return Router(weight_ED)

    def captured(rows_ED: Tensor) -> float:
        mask_TE = top_mask(held_x_TD @ rows_ED.T, shape.experts_per_token)
        return float((held_energy_TE * mask_TE).sum())

    best_ED, most = weight_ED, captured(weight_ED)
    rows_ED = weight_ED.clone().requires_grad_()
    optimiser = torch.optim.Adam([rows_ED], lr=learning_rate * float(weight_ED.std()))
    scale = float(energy_TE.sum(1).mean())
    for step in range(1, steps + 1):
        pick = torch.randint(len(x_TD), (min(batch, len(x_TD)),), generator=generator).to(
            x_TD.device
        )
        # Ten times as fast as x_TD[pick].
        some_TD, some_TE = x_TD.index_select(0, pick), energy_TE.index_select(0, pick)
        gain = _soft_energy(some_TD @ rows_ED.T, some_TE / scale, shape.experts_per_token)
        optimiser.zero_grad()
        (-gain).backward()
        optimiser.step()
        if step % 25 == 0 and captured(rows_ED.detach()) > most:
            best_ED = rows_ED.detach().clone()
            most = captured(best_ED)
    return Router(best_ED - best_ED.mean(0))


def _balanced(
    router: Router, profile: Profile, worth_TE: Tensor, shape: Shape, load_cv: float
) -> Router:
    if not load_cv or shape.experts_per_token == shape.num_experts:
        return router
    x_TD, _ = profile.inputs()
    rows_ED, curve = balance(
        router.weight_ED, x_TD, worth_TE[: len(x_TD)], shape.experts_per_token, load_cv
    )
    return dataclasses.replace(router, weight_ED=rows_ED, balance=tuple(curve))


def _soft_energy(score_TE: Tensor, energy_TE: Tensor, k: int, sharpness: float = 4.0) -> Tensor:
    """Mean energy of a soft choice of k experts per token; differentiable in the scores."""
    edge_TK = score_TE.topk(k + 1, dim=1).values
    threshold_T1 = edge_TK[:, k - 1 :].mean(1, keepdim=True).detach()
    chosen_TE = torch.sigmoid(sharpness * (score_TE - threshold_T1))
    chosen_TE = chosen_TE * (k / chosen_TE.sum(1, keepdim=True))
    return (chosen_TE * energy_TE).sum(1).mean()
