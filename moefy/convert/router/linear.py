"""Our router: linear, fitted to how much output energy each expert has on each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from moefy.convert.load_balance import balance
from moefy.convert.ridge import scorer, scores
from moefy.convert.routed_ffn import RoutedFFN, expert_energies, gains, level, top_mask
from moefy.types import FFN, Partition, Profile, Range, Router, Shape


@dataclass(frozen=True)
class Options:
    """The options of `fit` and `refine`."""

    strength: Annotated[float, Range(1e-9)] = 1e-2
    steps: Annotated[int, Range(0, 1e6)] = 100
    batch: Annotated[int, Range(1)] = 2048
    learning_rate: Annotated[float, Range(1e-9, 1e3)] = 1e-2
    load_cv: Annotated[float, Range(0)] = 0.25


DEFAULTS = Options()


def fit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    shape: Shape,
    *,
    generator: torch.Generator,
    options: Options = DEFAULTS,
) -> Router:
    """Fit by ridge regression, then take `steps` of ascent on the captured energy itself.

    The load of the experts is then evened out (see `balance`) until its coefficient of variation is
    at most `load_cv`; 0 leaves it as it is.

    The steps maximise the energy of a soft top-k choice (sigmoids around the k-th score). They
    are judged on the held-out tokens by the energy that the hard choice captures, and the rows
    that captured most are returned: the closed form, if no step improved on it.
    """
    worth_TE = energies(ffn, profile, partition)
    return _fit(profile, worth_TE, shape.experts_per_token, generator, options)


def refine(
    routed: RoutedFFN, profile: Profile, *, generator: torch.Generator, options: Options = DEFAULTS
) -> Router:
    """Fit again, to what the experts of a refitted FFN are worth beside those that are chosen."""
    return _fit(profile, worths(routed, profile), routed.k, generator, options)


def _fit(
    profile: Profile, worth_TE: Tensor, k: int, generator: torch.Generator, options: Options
) -> Router:
    return fit_rows(profile.inputs(), profile.gram_DD, worth_TE, k, generator, options)


def energies(ffn: FFN, profile: Profile, partition: Partition) -> Tensor:
    """What `fit` fits to: the energies of all processes, (T, E)."""
    return profile.group.gather(expert_energies(ffn, profile, partition, "all"))


def worths(routed: RoutedFFN, profile: Profile) -> Tensor:
    """What `refine` fits to, (T, E): an expert's worth is the squared error that it takes away.

    See `gains`. Energies know neither what the refit has made up for nor what the experts of a
    token say alike.
    """
    worth_TE = profile.group.gather(gains(routed, profile))
    worth_TE -= worth_TE.min(1, keepdim=True).values  # only differences decide
    return worth_TE


def fit_rows(
    inputs: tuple[Tensor, Tensor],
    gram_DD: Tensor,
    worth_TE: Tensor,
    k: int,
    generator: torch.Generator,
    options: Options,
    start_ED: Tensor | None = None,
) -> Router:
    """Rows whose k highest scores have most of the worth, which is at least zero.

    `inputs` are those to fit on and those held out, (T, D) each, `gram_DD` is X'X of the first and
    `worth_TE` is of both. The steps start at `start_ED`, else at the closed form.
    """
    (x_TD, held_x_TD), curve = inputs, []
    fit_TE, held_TE = worth_TE[: len(x_TD)], worth_TE[len(x_TD) :]
    if start_ED is None:
        weight_ED = scorer(x_TD, options.strength, gram_DD)(fit_TE)
    else:
        weight_ED = level(start_ED, x_TD)
    if k == worth_TE.shape[1]:
        return Router(weight_ED)

    def captured(rows_ED: Tensor) -> float:
        return float((held_TE * top_mask(scores(held_x_TD, rows_ED), k)).sum())

    if options.steps:
        weight_ED = _ascended(weight_ED, x_TD, fit_TE, k, captured, generator, options)
    if options.load_cv:
        weight_ED, curve = balance(weight_ED, x_TD, fit_TE, k, options.load_cv, gram_DD)
    return Router(weight_ED, balance=tuple(curve))


def _ascended(
    weight_ED: Tensor,
    x_TD: Tensor,
    worth_TE: Tensor,
    k: int,
    captured: Callable[[Tensor], float],
    generator: torch.Generator,
    options: Options,
) -> Tensor:
    """The rows that `captured` most during the ascent, which starts at `weight_ED`."""
    best_ED, most = weight_ED, captured(weight_ED)
    rows_ED = weight_ED.clone().requires_grad_()
    optimiser = torch.optim.Adam([rows_ED], lr=options.learning_rate * float(weight_ED.std()))
    scale, batch = float(worth_TE.sum(1).mean()), min(options.batch, len(x_TD))
    for step in range(1, options.steps + 1):
        pick = torch.randint(len(x_TD), (batch,), generator=generator)
        # Ten times as fast as x_TD[pick].
        some_TD = x_TD.index_select(0, pick.to(x_TD.device)).to(worth_TE.device)
        some_TE = worth_TE.index_select(0, pick.to(worth_TE.device))
        gain = _soft_energy(some_TD @ rows_ED.T, some_TE / scale, k)
        optimiser.zero_grad()
        (-gain).backward()
        optimiser.step()
        if step % 25 == 0 and captured(rows_ED.detach()) > most:
            best_ED = rows_ED.detach().clone()
            most = captured(best_ED)
    return best_ED - best_ED.mean(0)


def _soft_energy(score_TE: Tensor, energy_TE: Tensor, k: int, sharpness: float = 4.0) -> Tensor:
    """Mean energy of a soft choice of k experts per token; differentiable in the scores."""
    edge_TK = score_TE.topk(k + 1, dim=1).values
    threshold_T1 = edge_TK[:, k - 1 :].mean(1, keepdim=True).detach()
    chosen_TE = torch.sigmoid(sharpness * (score_TE - threshold_T1))
    chosen_TE = chosen_TE * (k / chosen_TE.sum(1, keepdim=True))
    return (chosen_TE * energy_TE).sum(1).mean()
