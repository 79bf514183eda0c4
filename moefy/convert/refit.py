"""Closed-form correction of `down_proj` for the neurons that routing leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.convert.profile import CHUNK, chunks, some_activations
from moefy.convert.ridge import damping, ridge, solver
from moefy.convert.routed_ffn import RoutedFFN, Run
from moefy.types import Profile

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridge strengths, as multiples of the mean squared activation."""

START = 0.3
"""The strength that is mostly best."""

MIXTURES = 128
"""Random mixtures of wide outputs, on which strengths are compared."""

TERMS = 4
"""Solutions that are combined to those of other strengths."""

EXPERT_STRENGTHS = (0.3, 1.0, 3.0, 10.0)
"""Ridge strengths for single experts, which see fewer tokens."""

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


@dataclass(frozen=True)
class _Sums:
    """Sums over the fitting tokens of all processes."""

    gram_AA: Tensor  # H'H of the neurons that the partition uses
    cross_AD: Tensor  # H'R, of what the outputs miss
    missing: float  # |R|^2
    norm: float  # |Y|^2


def refit(
    routed: RoutedFFN, profile: Profile, *, enabled: bool = True, known: float | None = None
) -> Refit:
    """Correct `down_proj` by ridge regression under the actual routing, if that helps.

    With H the activations that run (zero elsewhere) and R = Y - H W' what they miss of the output Y
    that is aimed at, the correction dW' = (H'H + s * mean(diag) * I)^-1 H'R minimises the missing
    output and stays near the dense weights. The strength s with the least held-out error wins (see
    `_best_strength`), and is not looked for again where it is `known` from a refit under another
    routing; the dense weights are kept when no error is below theirs.

    Source: the least squares of SparseGPT (arXiv 2301.00774), over a mask that routing sets per
    token instead of a fixed one.
    Cost: one F x F Gram matrix in float32, of which pairs of neurons count that run together, and a
    Cholesky factorisation, or two where another strength than `START` is best.
    """
    total, down_AD = profile.group.total, routed.down_AD
    wrong, norm = map(total, _error(_runs(routed, profile, "heldout"), down_AD))
    before = (wrong / norm) ** 0.5
    sums = _sums(routed, profile, down_AD, enabled)
    down_DF = routed.ffn.down_DF
    plain = Refit(down_DF, before, before, (sums.missing / sums.norm) ** 0.5, None)
    if not enabled or sums.missing <= ROUNDING * sums.norm:
        return plain
    strength, solve = known or START, None
    tried = [strength]
    while True:
        solve = solver(sums.gram_AA, strength)
        best = known or _best_strength(routed, profile, sums, solve, strength)
        if best is None:
            return plain
        if best in tried:
            break
        solve = None  # two factors would be the largest tensors there are
        tried.append(strength := best)
    delta_AD = solve(sums.cross_AD)
    wrong = total(_error(_runs(routed, profile, "heldout"), down_AD + delta_AD)[0])
    after = (wrong / norm) ** 0.5
    if after >= before:
        return plain
    # |R - H dW|^2 = |R|^2 - 2 <dW, H'R> + <dW, H'H dW>, and H'H dW = H'R - damping * dW: the
    # fitting tokens need no other pass.
    left = sums.missing - float((delta_AD * sums.cross_AD).sum())
    left -= damping(sums.gram_AA, strength) * float(delta_AD.square().sum())
    down_DF = down_DF.clone()
    down_DF[:, routed.used_A] += delta_AD.T
    return Refit(down_DF, before, after, (max(left, 0.0) / sums.norm) ** 0.5, strength)


def _sums(routed: RoutedFFN, profile: Profile, down_AD: Tensor, enabled: bool) -> _Sums:
    """What the correction follows from; its matrices stay zero unless `enabled`."""
    group = profile.group
    gram_AA = down_AD.new_zeros(len(down_AD), len(down_AD))
    cross_AD = torch.zeros_like(down_AD)
    missing = norm = 0.0
    # Before the processes sum in turn, each does at the same time what it can.
    rests = []
    if group.size > 1:
        rests = [y_TD - run.outputs(down_AD) for run, y_TD in _runs(routed, profile, "fit")]

    def add() -> None:
        nonlocal missing, norm
        for number, (run, y_TD) in enumerate(_runs(routed, profile, "fit")):
            rest_TD = rests[number] if rests else y_TD - run.outputs(down_AD)
            missing += float(rest_TD.square().sum())
            norm += float(y_TD.square().sum())
            if enabled:
                run.add_products(rest_TD, gram_AA, cross_AD)

    group.in_turn(add, gram_AA, cross_AD)
    return _Sums(gram_AA, cross_AD, group.total(missing), max(group.total(norm), 1e-30))


def _best_strength(
    routed: RoutedFFN,
    profile: Profile,
    sums: _Sums,
    solve: Callable[[Tensor], Tensor],
    strength: float,
) -> float | None:
    """The strength of least held-out error, told by what solves for one `strength`; None where no
    correction helps.

    With S = (G + s I)^-1 at that strength, corrections of others are sought among the combinations
    of S C, S^2 C, ..., whose weights the same least squares give. That is exact for `strength`
    itself and the better the nearer the other is. Of wide outputs, random mixtures are compared.

    Source: shift-and-invert Krylov subspaces (Moret and Novati, BIT 44, 2004), one for all outputs.
    """
    down_AD, hidden = routed.down_AD, sums.cross_AD.shape[1]
    mix_DM = torch.eye(hidden)
    if hidden > MIXTURES:
        generator = torch.Generator().manual_seed(0)
        mix_DM = torch.randn(hidden, MIXTURES, generator=generator)
    mix_DM = mix_DM.to(down_AD.device)
    at = damping(sums.gram_AA, strength)
    terms = [sums.cross_AD @ mix_DM]
    for _ in range(TERMS):
        terms.append(solve(terms[-1]) * at)
    inner_QQ = _inner(terms)
    seen_QQ = torch.zeros_like(inner_QQ)
    for run, y_TD in _runs(routed, profile, "heldout"):
        rest_TM = (y_TD - run.outputs(down_AD)) @ mix_DM
        parts_TM = run.outputs(torch.cat(terms[1:], 1)).split(mix_DM.shape[1], 1)
        seen_QQ += _inner([rest_TM, *parts_TM])
    profile.group.sum(seen_QQ)
    least, best = float(seen_QQ[0, 0]), None
    for other in STRENGTHS:
        more = damping(sums.gram_AA, other) - at
        system_QQ = at * inner_QQ[1:, :-1] + more * inner_QQ[1:, 1:]
        weight_Q = torch.linalg.lstsq(system_QQ, inner_QQ[1:, :1]).solution
        left_Q = torch.cat([weight_Q.new_ones(1, 1), -weight_Q])
        if (error := float(left_Q.T @ seen_QQ @ left_Q)) < least:
            least, best = error, other
    return profile.group.broadcast_object(best)


def _inner(parts: list[Tensor]) -> Tensor:
    """Inner products of all pairs of tensors, in float64."""
    flat = torch.stack(parts).flatten(1).double()
    return flat @ flat.T


def _runs(routed: RoutedFFN, profile: Profile, part: str) -> Iterator[tuple[Run, Tensor]]:
    """Yield the activations that run and what the output aims at (T, D), chunk by chunk."""
    for x_TD, h_TF, y_TD, position_T in chunks(routed.ffn, profile, part):
        yield routed.run(h_TF, routed.mask(x_TD, h_TF, position_T)), y_TD


def _error(runs: Iterable[tuple[Run, Tensor]], down_AD: Tensor) -> tuple[float, float]:
    """Summed squared output error under `down_AD`, and the summed squared dense output."""
    wrong = norm = 0.0
    for run, y_TD in runs:
        wrong += float((run.outputs(down_AD) - y_TD).square().sum())
        norm += float(y_TD.square().sum())
    return wrong, max(norm, 1e-30)


def refit_experts(routed: RoutedFFN, profile: Profile) -> tuple[Tensor, float]:
    """Correct each expert's own columns of `down_DF` on the tokens that it is chosen for.

    For experts that overlap: the FFN has a neuron once for every expert it stands in. The ridge
    shrinks towards the columns that the FFN comes with, which a refit of all experts together has
    found, so that an expert with few tokens stays near those. One strength serves all experts, and
    none is kept where it does not err less on the held-out tokens. Returns the columns and that
    error, relative as in `Refit`. What the outputs miss is written over the profile's `goal_TD`.
    """
    down_DF, num_fit = routed.ffn.down_DF, profile.num_fit
    experts_EN, group = routed.partition.experts_EN, profile.group
    norm = max(group.total(float(profile.goal_TD[num_fit:].square().sum())), 1e-30)
    tokens_of = _leave_rests(routed, profile)
    rest_TD, place = profile.goal_TD, profile.goal_TD.device
    left = {
        strength: rest_TD[num_fit:].to(down_DF.device, copy=True) for strength in EXPERT_STRENGTHS
    }
    deltas: dict[float, list[Tensor]] = {strength: [] for strength in EXPERT_STRENGTHS}
    for neurons, token_T in zip(experts_EN, tokens_of, strict=True):
        h_TN = some_activations(routed.ffn, profile, token_T, neurons)
        fit_T = token_T < num_fit
        some_TN = group.gather(h_TN[fit_T])
        gram_NN = some_TN.T @ some_TN
        cross_ND = some_TN.T @ group.gather(rest_TD[token_T[fit_T].to(place)].to(h_TN.device))
        for strength in EXPERT_STRENGTHS:
            delta_ND = ridge(gram_NN, cross_ND, strength)
            deltas[strength].append(delta_ND)
            left[strength].index_add_(0, token_T[~fit_T] - num_fit, h_TN[~fit_T] @ -delta_ND)
    errors = {s: group.total(float(rest.square().sum())) for s, rest in left.items()}
    best = min(errors, key=errors.__getitem__)
    plain = group.total(float(rest_TD[num_fit:].square().sum()))
    if errors[best] >= plain:
        return down_DF, (plain / norm) ** 0.5
    down_DF = down_DF.clone()
    for neurons, delta_ND in zip(experts_EN, deltas[best], strict=True):
        down_DF[:, neurons] += delta_ND.T
    return down_DF, (errors[best] / norm) ** 0.5


def _leave_rests(routed: RoutedFFN, profile: Profile) -> list[Tensor]:
    """Leave of `goal_TD` what the outputs miss on all tokens; give which go to each expert."""
    masks, down_AD = [], routed.down_AD
    for number, (x_TD, h_TF, goal_TD, position_T) in enumerate(chunks(routed.ffn, profile, "all")):
        masks.append(routed.mask(x_TD, h_TF, position_T))
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        profile.goal_TD[part] = goal_TD - routed.run(h_TF, masks[-1]).outputs(down_AD)
    return [chosen_T.nonzero()[:, 0] for chosen_T in torch.cat(masks).T]
