"""Closed-form correction of `down_proj` for the neurons that routing leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.convert.profile import chunks, some_activations
from moefy.convert.ridge import damping, ridge
from moefy.convert.routed_ffn import RoutedFFN
from moefy.types import Profile

STRENGTHS = ((0.3, 1.0, 3.0), (0.1, 0.03, 0.01))
"""Ridge strengths, as multiples of the mean squared activation: upward first, then downward, each
way until the held-out error rises. It has one minimum, mostly at the first or second."""

MIXTURES = 256
"""Random mixtures of the outputs, on which strengths are compared where there are at least four
times as many outputs. Each strength costs a factorisation then, and only the best one a solution
for all outputs."""

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
    output and stays near the dense weights. The strength s with the least held-out error wins; the
    dense weights are kept when none is below theirs. Of wide outputs, strengths are compared on
    random mixtures (see `MIXTURES`), and not again where the strength is `known` from a refit under
    another routing.

    Source: the least squares of SparseGPT (arXiv 2301.00774), over a mask that routing sets per
    token instead of a fixed one.
    Cost: one F x F Gram matrix in float32, and a Cholesky factorisation per strength.
    """
    down_DF, total = routed.ffn.down_DF, profile.group.total
    neurons = [routed.partition.shared_S, routed.partition.experts_EN.reshape(-1)]
    used = torch.cat(neurons).unique()
    wrong, norm = map(total, _error(_runs(routed, profile, "heldout"), down_DF))
    before = (wrong / norm) ** 0.5
    sums = _sums(routed, profile, used, enabled)
    plain = Refit(down_DF, before, before, (sums.missing / sums.norm) ** 0.5, None)
    if not enabled or sums.missing <= ROUNDING * sums.norm:
        return plain

    def error(delta_AD: Tensor) -> float:
        changed_DF = _corrected(down_DF, used, delta_AD)
        return (total(_error(_runs(routed, profile, "heldout"), changed_DF)[0]) / norm) ** 0.5

    strengths: Sequence[Sequence[float]] = STRENGTHS
    if routed.ffn.hidden_size >= 4 * MIXTURES:
        strength = known or _strength(routed, profile, used, sums)
        strengths = ((strength,),) if strength else ()
    best = _search(sums.gram_AA, sums.cross_AD, error, before, strengths)
    if best is None:
        return plain
    delta_AD, after, strength = best
    # |R - H dW|^2 = |R|^2 - 2 <dW, H'R> + <dW, H'H dW>, and H'H dW = H'R - damping * dW: the
    # fitting tokens need no other pass.
    left = sums.missing - float((delta_AD * sums.cross_AD).sum())
    left -= damping(sums.gram_AA, strength) * float(delta_AD.square().sum())
    error_fit = (max(left, 0.0) / sums.norm) ** 0.5
    return Refit(_corrected(down_DF, used, delta_AD), before, after, error_fit, strength)


def _sums(routed: RoutedFFN, profile: Profile, used: Tensor, enabled: bool) -> _Sums:
    """What the correction follows from; its matrices stay zero unless `enabled`."""
    down_DF, group = routed.ffn.down_DF, profile.group
    gram_AA = torch.zeros(len(used), len(used), device=used.device)
    cross_AD = torch.zeros(len(used), down_DF.shape[0], device=used.device)
    missing = norm = 0.0
    # Before the processes sum in turn, each does at the same time what it can.
    rests = []
    if group.size > 1:
        rests = [y_TD - run_TF @ down_DF.T for run_TF, y_TD in _runs(routed, profile, "fit")]

    def add() -> None:
        nonlocal missing, norm
        for number, (run_TF, y_TD) in enumerate(_runs(routed, profile, "fit")):
            rest_TD = rests[number] if rests else y_TD - run_TF @ down_DF.T
            missing += float(rest_TD.square().sum())
            norm += float(y_TD.square().sum())
            if enabled:
                part_TA = run_TF if len(used) == routed.ffn.num_neurons else run_TF[:, used]
                gram_AA.addmm_(part_TA.T, part_TA)
                cross_AD.addmm_(part_TA.T, rest_TD)

    group.in_turn(add, gram_AA, cross_AD)
    return _Sums(gram_AA, cross_AD, group.total(missing), max(group.total(norm), 1e-30))


def _search(
    gram_AA: Tensor,
    cross_AD: Tensor,
    error: Callable[[Tensor], float],
    before: float,
    strengths: Sequence[Sequence[float]] = STRENGTHS,
) -> tuple[Tensor, float, float] | None:
    """The correction of least held-out error, that error, and its strength; None where none errs
    less than `before`."""
    best: tuple[Tensor, float, float] | None = None
    for way in strengths:
        for strength in way:
            delta_AD = ridge(gram_AA, cross_AD, strength)
            after = error(delta_AD)
            if after < (best[1] if best else before):
                best = delta_AD, after, strength
            elif best:
                break
        if best is None:
            break  # a weaker ridge departs further from the dense weights
    return best


def _strength(routed: RoutedFFN, profile: Profile, used: Tensor, sums: _Sums) -> float | None:
    """The strength of least held-out error on random mixtures of the outputs."""
    down_DF, total = routed.ffn.down_DF, profile.group.total
    generator = torch.Generator().manual_seed(0)
    mix_DM = torch.randn(len(down_DF), MIXTURES, generator=generator).to(used.device)
    heldout = _runs(routed, profile, "heldout")
    rests = [(y_TD - run_TF @ down_DF.T) @ mix_DM for run_TF, y_TD in heldout]

    def error(delta_AM: Tensor) -> float:
        whole_FM = delta_AM.new_zeros(down_DF.shape[1], MIXTURES).index_copy_(0, used, delta_AM)
        heldout = _runs(routed, profile, "heldout")
        runs = ((run_TF, rest_TM) for (run_TF, _), rest_TM in zip(heldout, rests, strict=True))
        return total(_error(runs, whole_FM.T)[0])

    before = total(sum(float(rest_TM.square().sum()) for rest_TM in rests))
    best = _search(sums.gram_AA, sums.cross_AD @ mix_DM, error, before)
    return best[2] if best else None


def _corrected(down_DF: Tensor, used: Tensor, delta_AD: Tensor) -> Tensor:
    if len(used) == down_DF.shape[1]:
        return down_DF + delta_AD.T
    down_DF = down_DF.clone()
    down_DF[:, used] += delta_AD.T
    return down_DF


def _runs(routed: RoutedFFN, profile: Profile, part: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the activations that run (T, F) and what the output aims at (T, D), chunk by chunk."""
    for x_TD, h_TF, y_TD in chunks(routed.ffn, profile, part):
        yield routed.run(h_TF, routed.mask(x_TD, h_TF)), y_TD


def _error(runs: Iterable[tuple[Tensor, Tensor]], down_DF: Tensor) -> tuple[float, float]:
    """Summed squared output error under `down_DF`, and the summed squared dense output."""
    wrong = norm = 0.0
    for run_TF, y_TD in runs:
        wrong += float((run_TF @ down_DF.T - y_TD).square().sum())
        norm += float(y_TD.square().sum())
    return wrong, max(norm, 1e-30)


def refit_experts(routed: RoutedFFN, profile: Profile) -> tuple[Tensor, float]:
    """Correct each expert's own columns of `down_DF` on the tokens that it is chosen for.

    For experts that overlap: the FFN has a neuron once for every expert it stands in. The ridge
    shrinks towards the columns that the FFN comes with, which a refit of all experts together has
    found, so that an expert with few tokens stays near those. One strength serves all experts, and
    none is kept where it does not err less on the held-out tokens. Returns the columns and that
    error, relative as in `Refit`.
    """
    down_DF, num_fit = routed.ffn.down_DF, profile.num_fit
    experts_EN, group = routed.partition.experts_EN, profile.group
    rest_TD, tokens_of = _rests(routed, profile)
    norm = max(group.total(float(profile.goal_TD[num_fit:].square().sum())), 1e-30)
    left = {strength: rest_TD[num_fit:].clone() for strength in EXPERT_STRENGTHS}
    deltas: dict[float, list[Tensor]] = {strength: [] for strength in EXPERT_STRENGTHS}
    for neurons, token_T in zip(experts_EN, tokens_of, strict=True):
        h_TN = some_activations(routed.ffn, profile, token_T, neurons)
        fit_T = token_T < num_fit
        some_TN = group.gather(h_TN[fit_T])
        gram_NN = some_TN.T @ some_TN
        cross_ND = some_TN.T @ group.gather(rest_TD[token_T[fit_T]])
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


def _rests(routed: RoutedFFN, profile: Profile) -> tuple[Tensor, list[Tensor]]:
    """What the outputs miss on all tokens, (T, D), and which tokens go to each expert."""
    rests, masks = [], []
    for x_TD, h_TF, goal_TD in chunks(routed.ffn, profile, "all"):
        masks.append(routed.mask(x_TD, h_TF))
        rests.append(goal_TD - routed.run(h_TF, masks[-1]) @ routed.ffn.down_DF.T)
    return torch.cat(rests), [chosen_T.nonzero()[:, 0] for chosen_T in torch.cat(masks).T]
