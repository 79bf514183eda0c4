"""A split FFN with the router that chooses among its experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moefy.convert.profile import chunks
from moefy.types import FFN, Partition, Profile, Router, pieces

GAINS = 1 << 24
"""Numbers in memory at a time when experts' outputs are compared."""

BLOCK = 512
"""Neurons that are multiplied at a time: of a Gram matrix, the blocks behind are left out."""


@dataclass(frozen=True)
class Run:
    """What the neurons of a `RoutedFFN` answer to some tokens, zero where they do not run."""

    h_TA: Tensor
    blocks: list[tuple[slice, Tensor | slice]]
    """All neurons, in runs of at most `BLOCK`, with the tokens of which they may be other than
    zero. Products leave out the others."""

    def outputs(self, weight_AB: Tensor) -> Tensor:
        """The product with weights, such as those of `down`, (T, B)."""
        y_TB = self.h_TA.new_zeros(len(self.h_TA), weight_AB.shape[1])
        for neurons, tokens in self.blocks:
            y_TB[tokens] += self.h_TA[:, neurons][tokens] @ weight_AB[neurons]
        return y_TB

    def add_products(self, rest_TD: Tensor, gram_AA: Tensor, cross_AD: Tensor) -> None:
        """Add H'H, of which only the lower triangle is whole, and H'R to two matrices."""
        for neurons, tokens in self.blocks:
            upto_TA = self.h_TA[:, : neurons.stop][tokens]
            part_TN = upto_TA[:, neurons]
            gram_AA[neurons, : neurons.stop].addmm_(part_TN.T, upto_TA)
            cross_AD[neurons].addmm_(part_TN.T, rest_TD[tokens])


@dataclass(frozen=True)
class RoutedFFN:
    """An FFN of which each token runs the shared neurons and those of `k` experts."""

    ffn: FFN
    partition: Partition
    router: Router
    k: int  # zero where nothing is routed

    @property
    def num_active(self) -> int:
        """Neurons that run for a token."""
        return len(self.partition.shared_S) + self.k * self.partition.experts_EN.shape[1]

    @cached_property
    def used_A(self) -> Tensor:
        """Neurons that run for some token: the shared ones, then one expert's behind the other's.
        Where experts overlap, each stands once, in rising order."""
        used_A = torch.cat([self.partition.shared_S, self.partition.experts_EN.reshape(-1)])
        once_A = used_A.unique()
        return used_A if len(once_A) == len(used_A) else once_A

    @property
    def _overlaps(self) -> bool:
        return len(self.used_A) < len(self.partition.shared_S) + self.partition.experts_EN.numel()

    @property
    def down_AD(self) -> Tensor:
        """What the neurons of `used_A` write."""
        return self.ffn.down_DF.T.index_select(0, self.used_A)

    def mask(self, x_TD: Tensor, h_TF: Tensor, position_T: Tensor | None = None) -> Tensor:
        """One where a token goes to an expert, else zero; shape (T, E)."""
        if self.router.norm_EN is None:
            return top_mask(self.router.scores(x_TD, position_T), self.k)
        return top_mask(_squares(self.partition, self.router.norm_EN, h_TF), self.k)

    def run(self, h_TF: Tensor, mask_TE: Tensor) -> Run:
        """The activations of the neurons that run: those of `used_A`, of all in `h_TF`.

        A neuron that stands in several chosen experts counts once for each.
        """
        h_TA = h_TF.index_select(1, self.used_A)
        num_shared, num_used = len(self.partition.shared_S), h_TA.shape[1]
        if self._overlaps:
            times_TF = mask_TE @ membership(self.partition, h_TF.shape[1]).T
            times_TF[:, self.partition.shared_S] = 1.0
            h_TA.mul_(times_TF.index_select(1, self.used_A))
            return Run(h_TA, [(part, slice(None)) for part in _cut(0, num_used)])
        blocks: list[tuple[slice, Tensor | slice]] = [
            (part, slice(None)) for part in _cut(0, num_shared)
        ]
        first, width = num_shared, self.partition.experts_EN.shape[1]
        for mask_T in mask_TE.unbind(1):
            token_T = mask_T.nonzero()[:, 0]
            h_TA[:, first : first + width].mul_(mask_T[:, None])
            blocks += [(part, token_T) for part in _cut(first, first + width)]
            first += width
        return Run(h_TA, blocks)

    def with_down(self, down_DF: Tensor) -> RoutedFFN:
        """The same with other `down_DF`."""
        return dataclasses.replace(self, ffn=dataclasses.replace(self.ffn, down_DF=down_DF))


def _cut(start: int, stop: int) -> list[slice]:
    return [slice(first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK)]


def unrouted(ffn: FFN, partition: Partition) -> RoutedFFN:
    """An FFN of which every token runs the shared neurons alone."""
    return RoutedFFN(ffn, partition, Router(ffn.up_FD.new_zeros(0, ffn.hidden_size)), 0)


def unfold(routed: RoutedFFN, profile: Profile) -> tuple[RoutedFFN, Profile]:
    """The same with every neuron as often as it stands in the partition, which then is disjoint."""
    partition = routed.partition
    num_shared, (num_experts, width) = len(partition.shared_S), partition.experts_EN.shape
    neuron_A = torch.cat([partition.shared_S, partition.experts_EN.reshape(-1)])
    place_A = torch.arange(len(neuron_A), device=neuron_A.device)
    disjoint = Partition(place_A[:num_shared], place_A[num_shared:].view(num_experts, width))
    return (
        dataclasses.replace(routed, ffn=routed.ffn.some(neuron_A), partition=disjoint),
        dataclasses.replace(
            profile, folded=(routed.ffn, neuron_A), energy_F=profile.energy_F[neuron_A]
        ),
    )


def expert_energies(ffn: FFN, profile: Profile, partition: Partition, part: str) -> Tensor:
    """Summed output energy of each routed expert's neurons on each token of `part`, (T, E)."""
    return torch.cat(
        [energies_of(ffn, partition, h_TF) for _, h_TF, *_ in chunks(ffn, profile, part)]
    )


def gains(routed: RoutedFFN, profile: Profile) -> Tensor:
    """Squared output error that each expert takes away on each token, shape (T, E).

    With r the error that is left and c the expert's output: |r + c|^2 - |r|^2 for an expert that
    the router chooses, and for another |r|^2 - |r - c|^2 in the place of the weakest chosen one.
    """
    shared_S, experts_EN = routed.partition.shared_S, routed.partition.experts_EN
    down_FD, parts = routed.ffn.down_DF.T, []
    down_SD, down_END = down_FD[shared_S], down_FD[experts_EN]
    rows = max(1, GAINS // (len(experts_EN) * down_FD.shape[1]))
    for x_TD, h_TF, goal_TD, position_T in chunks(routed.ffn, profile, "all"):
        mask_TE = routed.mask(x_TD, h_TF, position_T)
        rest_TD = goal_TD - h_TF.index_select(1, shared_S) @ down_SD
        h_ETN = h_TF.index_select(1, experts_EN.reshape(-1)).view(-1, *experts_EN.shape)
        h_ETN = h_ETN.transpose(0, 1)
        for start in range(0, len(x_TD), rows):
            some = slice(start, start + rows)
            part_ETD = torch.bmm(h_ETN[:, some], down_END)
            parts.append(_gains(part_ETD, rest_TD[some], mask_TE[some]))
    return torch.cat(parts)


def _gains(part_ETD: Tensor, rest_TD: Tensor, mask_TE: Tensor) -> Tensor:
    """The gains on tokens of which the shared neurons leave `rest_TD` to the experts' outputs."""

    def along(y_TD: Tensor) -> Tensor:  # one by one, or a tensor as large as all parts is made
        return torch.stack([(part_TD * y_TD).sum(1) for part_TD in part_ETD], 1)

    square_TE = torch.linalg.vector_norm(part_ETD, dim=2).square_().T
    left_TD = rest_TD - torch.einsum("te,etd->td", mask_TE, part_ETD)
    chosen_TE = 2 * along(left_TD) + square_TE
    weakest_T = chosen_TE.masked_fill(mask_TE == 0, float("inf")).argmin(1)
    left_TD += part_ETD[weakest_T, torch.arange(len(left_TD))]
    return torch.where(mask_TE == 1, chosen_TE, 2 * along(left_TD) - square_TE)


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
    value_FE = value_EN.new_zeros(num_neurons, len(value_EN))
    value_FE.T.scatter_(1, partition.experts_EN, value_EN)
    return value_FE


def top_mask(score_TE: Tensor, k: int) -> Tensor:
    """One where an expert is among the `k` highest of its token, else zero; shape (T, E)."""
    return torch.zeros_like(score_TE).scatter_(1, score_TE.topk(k, dim=1).indices, 1.0)


def level(weight_ED: Tensor, x_TD: Tensor) -> Tensor:
    """Rows that rank the experts as `weight_ED` does, sum to zero, and score with variance one."""
    weight_ED = weight_ED - weight_ED.mean(0)
    score_TE = torch.cat([x_CD @ weight_ED.T for x_CD in pieces(x_TD, weight_ED.device)])
    return weight_ED / score_TE.std().clamp_min(torch.finfo(torch.float32).tiny)
