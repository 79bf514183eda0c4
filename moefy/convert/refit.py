"""Closed-form correction of `down_proj` for the neurons that routing leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moefy.convert.profile import CHUNK, active_neurons, choose, chunks, some_activations
from moefy.convert.ridge import damping, ridge
from moefy.distributed import Group
from moefy.types import FFN, Partition, Profile, Router

STRENGTHS = ((0.3, 1.0, 3.0), (0.1, 0.03, 0.01))
"""Ridge strengths, as multiples of the mean squared activation: upward first, then downward, each
way until the held-out error rises. It has one minimum, mostly at the first or second."""

MIXTURES = 256
"""Of the outputs, on which the strengths are compared where these are at least four times as many:
each costs a factorisation then, but only the best one a solution for all outputs."""

EXPERT_STRENGTHS = (0.3, 1.0, 3.0, 10.0)
"""The same for single experts, which see fewer tokens."""

ROUNDING = 1e-10
"""Share of the squared output that may be missing by float32 rounding alone."""


@dataclass(frozen=True)
class Refit:
    """New `down_DF` and its relative output errors |y' - y| / |y| (held-out tokens, or `fit`).

    y is what the output aims at (see `profile.observe`): the dense output, but for drift.
    """

    down_DF: Tensor
    error_before: float
    error_after: float
    error_fit: float
    strength: float | None
    """None when no correction improved on the held-out tokens; then `down_DF` is the dense one."""


def refit(
    ffn: FFN,
    profile: Profile,
    partition: Partition,
    router: Router,
    k: int,
    *,
    enabled: bool = True,
    known: float | None = None,
) -> Refit:
    """Correct `down_proj` by ridge regression under the actual routing, if that helps.

    With H the activations that run (zero elsewhere) and R = Y - H W' what they miss of the output Y
    that is aimed at, the correction dW' = (H'H + s * mean(diag) * I)^-1 H'R minimises the missing
    output and stays near the dense weights. The strength s with the least held-out error wins; the
    dense weights are kept when none is below theirs. Of wide outputs, strengths are compared on
    random mixtures (see `MIXTURES`), and not again where the strength is `known` from a refit under
    another routing.

    Source: the least squares of SparseGPT (arXiv 2301.00774), over a mask that routing sets per
    token instead of a fixed one.
    Cost: one F x F Gram matrix in float32, and a Cholesky factorisation per strength.
    """
    num_neurons, used = ffn.num_neurons, _used(partition)
    heldout = partial(_runs, ffn, profile, partition, router, k, "heldout")
    group = profile.group
    before_held, norm_held = map(group.total, _error(heldout(), ffn.down_DF))
    gram_FF = torch.zeros(len(used), len(used), device=used.device)
    cross_FD = torch.zeros(len(used), ffn.down_DF.shape[0], device=used.device)
    missing = norm_fit = 0.0
    fitting = partial(_runs, ffn, profile, partition, router, k, "fit")
    # Before the processes sum in turn, each does at the same time what it can.
    rests = [y_TD - run_TF @ ffn.down_DF.T for run_TF, y_TD in fitting()] if group.size > 1 else []

    def add() -> None:
        nonlocal missing, norm_fit
        for number, (run_TF, y_TD) in enumerate(fitting()):
            rest_TD = rests[number] if rests else y_TD - run_TF @ ffn.down_DF.T
            missing += float(rest_TD.square().sum())
            norm_fit += float(y_TD.square().sum())
            if enabled:
                part_TA = run_TF if len(used) == num_neurons else run_TF[:, used]
                gram_FF.addmm_(part_TA.T, part_TA)
                cross_FD.addmm_(part_TA.T, rest_TD)

    group.in_turn(add, gram_FF, cross_FD)
    missing, norm_fit = group.total(missing), max(group.total(norm_fit), 1e-30)
    before = (before_held / norm_held) ** 0.5
    plain = Refit(ffn.down_DF, before, before, (missing / norm_fit) ** 0.5, None)
    if not enabled or missing <= ROUNDING * norm_fit:
        return plain

    def error(delta_FD: Tensor) -> float:
        held, _ = _error(heldout(), _corrected(ffn, used, delta_FD))
        return (group.total(held) / norm_held) ** 0.5

    if ffn.hidden_size < 4 * MIXTURES:
        found = _search(gram_FF, cross_FD, error, before)
    else:
        strength = known or _strength(ffn, used, gram_FF, cross_FD, heldout, group)
        found = _search(gram_FF, cross_FD, error, before, ((strength,),) if strength else ())
    if found is None:
        return plain
    best_FD, after, strength = found
    # |R - H dW|^2 = |R|^2 - 2 <dW, H'R> + <dW, H'H dW>, and H'H dW = H'R - damping * dW: the
    # fitting tokens need no other pass.
    left = missing - float((best_FD * cross_FD).sum())
    left -= damping(gram_FF, strength) * float(best_FD.square().sum())
    error_fit = (max(left, 0.0) / norm_fit) ** 0.5
    return Refit(_corrected(ffn, used, best_FD), before, after, error_fit, strength)


def _search(
    gram_FF: Tensor,
    cross_FD: Tensor,
    error: Callable[[Tensor], float],
    before: float,
    strengths: Sequence[Sequence[float]] = STRENGTHS,
) -> tuple[Tensor, float, float] | None:
    """The correction of least held-out error, that error, and its strength; None where none errs
    less than `before`."""
    best: tuple[Tensor, float, float] | None = None
    for way in strengths:
        for strength in way:
            delta_FD = ridge(gram_FF, cross_FD, strength)
            found = error(delta_FD)
            if found < (best[1] if best else before):
                best = delta_FD, found, strength
            elif best:
                break
        if best is None:
            break  # a weaker ridge departs further from the dense weights
    return best


def _strength(
    ffn: FFN,
    used: Tensor,
    gram_FF: Tensor,
    cross_FD: Tensor,
    heldout: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    group: Group,
) -> float | None:
    """The strength of least held-out error on random mixtures of the outputs."""
    generator = torch.Generator().manual_seed(0)
    mix_DM = torch.randn(ffn.hidden_size, MIXTURES, generator=generator).to(used.device)
    rests = [(y_TD - run_TF @ ffn.down_DF.T) @ mix_DM for run_TF, y_TD in heldout()]

    def error(delta_FM: Tensor) -> float:
        whole_FM = delta_FM.new_zeros(ffn.num_neurons, MIXTURES).index_copy_(0, used, delta_FM)
        runs = ((run_TF, rest_TM) for (run_TF, _), rest_TM in zip(heldout(), rests, strict=True))
        return group.total(_error(runs, whole_FM.T)[0])

    before = group.total(sum(float(rest_TM.square().sum()) for rest_TM in rests))
    found = _search(gram_FF, cross_FD @ mix_DM, error, before)
    return found[2] if found else None


def _corrected(ffn: FFN, used: Tensor, delta_FD: Tensor) -> Tensor:
    if len(used) == ffn.num_neurons:
        return ffn.down_DF + delta_FD.T
    down_DF = ffn.down_DF.clone()
    down_DF[:, used] += delta_FD.T
    return down_DF


def _used(partition: Partition) -> Tensor:
    return torch.cat([partition.shared_S, partition.experts_EN.reshape(-1)]).unique()


def _runs(
    ffn: FFN, profile: Profile, partition: Partition, router: Router, k: int, part: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the activations that run (T, F) and what the output aims at (T, D), chunk by chunk."""
    for x_TD, h_TF, y_TD in chunks(ffn, profile, part):
        if len(partition.experts_EN):
            mask_TE = choose(partition, router, k, x_TD, h_TF)
        else:
            mask_TE = x_TD.new_zeros(len(x_TD), 0)
        yield h_TF * active_neurons(partition, mask_TE, ffn.num_neurons), y_TD


def _error(runs: Iterable[tuple[Tensor, Tensor]], down_DF: Tensor) -> tuple[float, float]:
    """Summed squared output error under `down_DF`, and the summed squared dense output."""
    wrong = norm = 0.0
    for run_TF, y_TD in runs:
        wrong += float((run_TF @ down_DF.T - y_TD).square().sum())
        norm += float(y_TD.square().sum())
    return wrong, max(norm, 1e-30)


def refit_experts(
    ffn: FFN, profile: Profile, partition: Partition, router: Router, k: int
) -> tuple[Tensor, float]:
    """Correct each expert's own columns of `down_DF` on the tokens that it is chosen for.

    For experts that overlap: `ffn` has a neuron once for every expert it stands in. The ridge
    shrinks towards the columns that `ffn` comes with, which a refit of all experts together has
    found, so that an expert with few tokens stays near those. One strength serves all experts, and
    none is kept where it does not err less on the held-out tokens. Returns the columns and that
    error, relative as in `Refit`.
    """
    down_DF, num_fit = ffn.down_DF, profile.num_fit
    groups: list[list[Tensor]] = [[] for _ in partition.experts_EN]
    rests = []
    for number, (x_TD, h_TF, goal_TD) in enumerate(chunks(ffn, profile, "all")):
        mask_TE = choose(partition, router, k, x_TD, h_TF)
        run_TF = h_TF * active_neurons(partition, mask_TE, ffn.num_neurons)
        rests.append(goal_TD - run_TF @ down_DF.T)
        for expert, chosen_T in enumerate(mask_TE.T):
            groups[expert].append(chosen_T.nonzero()[:, 0] + number * CHUNK)
    rest_TD, everyone = torch.cat(rests), profile.group
    norm = max(everyone.total(float(profile.goal_TD[num_fit:].square().sum())), 1e-30)
    left = {strength: rest_TD[num_fit:].clone() for strength in EXPERT_STRENGTHS}
    deltas: dict[float, list[Tensor]] = {strength: [] for strength in EXPERT_STRENGTHS}
    for neurons, group in zip(partition.experts_EN, groups, strict=True):
        token_T = torch.cat(group)
        h_TN = some_activations(ffn, profile, token_T, neurons)
        fit_T = token_T < num_fit
        some_TN = everyone.gather(h_TN[fit_T])
        gram_NN = some_TN.T @ some_TN
        cross_ND = some_TN.T @ everyone.gather(rest_TD[token_T[fit_T]])
        for strength in EXPERT_STRENGTHS:
            delta_ND = ridge(gram_NN, cross_ND, strength)
            deltas[strength].append(delta_ND)
            left[strength].index_add_(0, token_T[~fit_T] - num_fit, h_TN[~fit_T] @ -delta_ND)
    errors = {s: everyone.total(float(rest.square().sum())) for s, rest in left.items()}
    best = min(errors, key=errors.__getitem__)
    plain = everyone.total(float(rest_TD[num_fit:].square().sum()))
    if errors[best] >= plain:
        return down_DF, (plain / norm) ** 0.5
    down_DF = down_DF.clone()
    for neurons, delta_ND in zip(partition.experts_EN, deltas[best], strict=True):
        down_DF[:, neurons] += delta_ND.T
    return down_DF, (errors[best] / norm) ** 0.5
