"""What an FFN does on calibration tokens, neuron by neuron and expert by expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moefy.distributed import ALONE, Group
from moefy.files.buffers import MEMORY, Store
from moefy.types import FFN, Partition, Profile, Router

CHUNK = 2048
"""Tokens whose activations are in memory at a time."""

GAINS = 1 << 24
"""Numbers in memory at a time when experts' outputs are compared."""


def chunks(
    ffn: FFN, profile: Profile, part: str = "fit"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs (T, D), scaled activations (T, F) and what the output aims at (T, D)."""
    start, stop = profile.span(part)
    for first in range(start, stop, CHUNK):
        tokens = slice(first, min(first + CHUNK, stop))
        yield profile.x_TD[tokens], activations(ffn, profile, tokens), profile.goal_TD[tokens]
        profile.release()


def activations(ffn: FFN, profile: Profile, tokens: slice) -> Tensor:
    """Scaled activations of some of the profile's tokens, shape (T, F)."""
    if profile.h_TF is not None:
        return profile.h_TF[tokens]
    return ffn.activations(profile.x_TD[tokens]).mul_(profile.scale_T[tokens, None])


def some_activations(ffn: FFN, profile: Profile, token_T: Tensor, neurons: Tensor) -> Tensor:
    """Scaled activations of some neurons on some tokens."""
    if profile.h_TF is not None:
        return profile.h_TF[token_T[:, None], neurons]
    h_TN = ffn.some(neurons).activations(profile.x_TD[token_T])
    return h_TN.mul_(profile.scale_T[token_T, None])


def unfold(
    ffn: FFN, profile: Profile, partition: Partition, cache_bytes: int = 1 << 30
) -> tuple[FFN, Profile, Partition]:
    """The same with every neuron as often as it stands in `partition`, which then is disjoint."""
    num_shared, (num_experts, width) = len(partition.shared_S), partition.experts_EN.shape
    neurons = torch.cat([partition.shared_S, partition.experts_EN.reshape(-1)])
    keep = profile.x_TD.shape[0] * len(neurons) * 4 <= cache_bytes
    h_TF = profile.h_TF[:, neurons] if profile.h_TF is not None and keep else None
    place = torch.arange(len(neurons), device=neurons.device)
    return (
        ffn.some(neurons),
        dataclasses.replace(profile, h_TF=h_TF, energy_F=profile.energy_F[neurons]),
        Partition(place[:num_shared], place[num_shared:].view(num_experts, width)),
    )


def observe(
    ffn: FFN,
    x_TD: Tensor,
    *,
    num_heldout: int,
    residual_TD: Tensor | None = None,
    join: Callable[[Tensor], Tensor] | None = None,
    dense_TD: Tensor | None = None,
    drift: float = 0.0,
    gradient_TD: Tensor | None = None,
    store: Store = MEMORY,
    group: Group = ALONE,
) -> Profile:
    """Profile `ffn` on the inputs `x_TD`, of which the last `num_heldout` are held out.

    `residual_TD` is what the output is added to, having gone through `join` where a layer does more
    than add; without it all tokens weigh the same. `dense_TD` is what leaves the layer in the dense
    model; the layers below, converted already, have let the residual stream drift from it, and the
    FFN aims at making good the share `drift` of that. `gradient_TD` is kept as it is. What is made
    for all tokens lies in `store`. The processes of `group` have other tokens, which count, too.

    Source: `drift` is the propagation strength of QEP (arXiv 2504.09629), which corrects the
    weights of a quantised layer for the errors of those below it.
    """
    num_tokens, device = x_TD.shape[0], x_TD.device
    num_fit = num_tokens - num_heldout
    kept_TF = store.empty(num_tokens, ffn.num_neurons, device=device)
    outputs_TD, aim_TD = store.empty(*x_TD.shape, device=device), None
    scales, squares = [], []
    if residual_TD is not None and dense_TD is not None and drift:
        aim_TD = store.empty(*x_TD.shape, device=device)
    for first in range(0, num_tokens, CHUNK):
        part = slice(first, first + CHUNK)
        h_TF = ffn.activations(x_TD[part])
        y_TD = h_TF @ ffn.down_DF.T
        scale_T = torch.ones_like(y_TD[:, 0])
        if residual_TD is not None:
            added_TD = join(y_TD) if join else y_TD
            leaving_TD = residual_TD[part] + added_TD
            scale_T = leaving_TD.norm(dim=1).clamp_min(1e-6).reciprocal_()
            if join:  # an error in the output arrives as much larger as the output itself does
                scale_T *= added_TD.norm(dim=1) / y_TD.norm(dim=1).clamp_min(1e-12)
            if dense_TD is not None and aim_TD is not None:
                lacking_TD = (dense_TD[part] - leaving_TD).mul_(drift)
                if join:  # what has to enter it, so that this leaves it
                    lacking_TD.div_(_slopes(y_TD, added_TD))
                aim_TD[part] = lacking_TD.add_(y_TD).mul_(scale_T[:, None])
        h_TF.mul_(scale_T[:, None])
        squares.append(h_TF[: max(num_fit - first, 0)].square().sum(0))
        outputs_TD[part] = y_TD.mul_(scale_T[:, None])
        scales.append(scale_T)
        kept_TF[part] = h_TF
        store.release()
    total_F = torch.zeros(ffn.num_neurons, dtype=torch.float64, device=device)
    for square_F in group.gather(torch.stack(squares)):
        total_F += square_F
    energy_F = (total_F / group.total(num_fit)).float() * ffn.down_norm_sq_F
    return Profile(
        x_TD,
        outputs_TD,
        torch.cat(scales),
        num_heldout,
        energy_F,
        kept_TF,
        aim_TD,
        gradient_TD,
        store.release,
        group,
    )


def _slopes(y_TD: Tensor, added_TD: Tensor) -> Tensor:
    """How much larger each output leaves a join than it enters, at least as much as the median.

    A norm's weights differ by thousands. Through those that are almost zero nothing can be made
    good, and trying to would fill the output that the norm divides by.
    """
    slope_TD = (added_TD / y_TD).nan_to_num_(0.0, 0.0, 0.0)
    least_T1 = slope_TD.abs().median(dim=1, keepdim=True).values.clamp_min(1e-12)
    return slope_TD.abs().maximum(least_T1).copysign_(slope_TD)


def expert_energies(ffn: FFN, profile: Profile, partition: Partition, part: str) -> Tensor:
    """Summed output energy of each routed expert's neurons on each token of `part`, (T, E)."""
    return torch.cat(
        [energies_of(ffn, partition, h_TF) for _, h_TF, _ in chunks(ffn, profile, part)]
    )


def gains(ffn: FFN, profile: Profile, partition: Partition, router: Router, k: int) -> Tensor:
    """Squared output error that each expert takes away on each token, shape (T, E).

    With r the error that is left and c the expert's output: |r + c|^2 - |r|^2 for an expert that
    the router chooses, and for another |r|^2 - |r - c|^2 in the place of the weakest chosen one.
    """
    found = []
    rows = max(1, GAINS // (len(partition.experts_EN) * ffn.hidden_size))
    for x_TD, h_TF, goal_TD in chunks(ffn, profile, "all"):
        mask_TE = choose(partition, router, k, x_TD, h_TF)
        run_TF = h_TF * active_neurons(partition, mask_TE, ffn.num_neurons)
        left_TD = goal_TD - run_TF @ ffn.down_DF.T
        for part in zip(h_TF.split(rows), left_TD.split(rows), mask_TE.split(rows), strict=True):
            found.append(_gains(ffn, partition, *part))
    return torch.cat(found)


def _gains(
    ffn: FFN, partition: Partition, h_TF: Tensor, left_TD: Tensor, mask_TE: Tensor
) -> Tensor:
    part_TED = torch.stack(
        [h_TF[:, neurons] @ ffn.down_DF[:, neurons].T for neurons in partition.experts_EN], 1
    )
    square_TE = part_TED.square().sum(2)
    chosen_TE = 2 * torch.einsum("td,ted->te", left_TD, part_TED) + square_TE
    weakest_T = chosen_TE.masked_fill(mask_TE == 0, float("inf")).argmin(1)
    without_TD = left_TD + part_TED[torch.arange(len(h_TF)), weakest_T]
    other_TE = 2 * torch.einsum("td,ted->te", without_TD, part_TED) - square_TE
    return torch.where(mask_TE == 1, chosen_TE, other_TE)


def energies_of(ffn: FFN, partition: Partition, h_TF: Tensor) -> Tensor:
    """Summed h^2 * |down column|^2 over each expert's neurons, shape (T, E)."""
    return _squares(partition, ffn.down_norm_sq_F[partition.experts_EN], h_TF)


def _squares(partition: Partition, norm_EN: Tensor, h_TF: Tensor) -> Tensor:
    return h_TF.square() @ _placed(partition, norm_EN, h_TF.shape[1])


def membership(partition: Partition, num_neurons: int) -> Tensor:
    """One where a neuron stands in an expert, shape (F, E)."""
    return _placed(partition, torch.ones_like(partition.experts_EN).float(), num_neurons)


def _placed(partition: Partition, value_EN: Tensor, num_neurons: int) -> Tensor:
    """The value of a neuron where it stands in an expert, else zero; shape (F, E)."""
    value_FE = torch.zeros(num_neurons, len(value_EN), device=value_EN.device)
    for expert, neurons in enumerate(partition.experts_EN):
        value_FE[neurons, expert] = value_EN[expert]
    return value_FE


def top_mask(score_TE: Tensor, k: int) -> Tensor:
    """One where an expert is among the `k` highest of its token, else zero; shape (T, E)."""
    return torch.zeros_like(score_TE).scatter_(1, score_TE.topk(k, dim=1).indices, 1.0)


def level(weight_ED: Tensor, x_TD: Tensor) -> Tensor:
    """Rows that rank the experts as `weight_ED` does, sum to zero, and score with variance one."""
    weight_ED = weight_ED - weight_ED.mean(0)
    return weight_ED / (x_TD @ weight_ED.T).std().clamp_min(torch.finfo(torch.float32).tiny)


def choose(partition: Partition, router: Router, k: int, x_TD: Tensor, h_TF: Tensor) -> Tensor:
    """The experts each token goes to, as ones in a (T, E) mask."""
    if router.norm_EN is None:
        return top_mask(x_TD @ router.weight_ED.T, k)
    return top_mask(_squares(partition, router.norm_EN, h_TF), k)


def active_neurons(partition: Partition, mask_TE: Tensor, num_neurons: int) -> Tensor:
    """One where a neuron runs for a token (shared, or in a chosen expert), shape (T, F)."""
    active_TF = mask_TE @ membership(partition, num_neurons).T
    active_TF[:, partition.shared_S] = 1.0
    return active_TF
