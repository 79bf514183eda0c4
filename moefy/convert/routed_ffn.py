"""A split FFN with the router that chooses among its experts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.convert.profile import chunks
from moefy.types import FFN, Partition, Profile, Router

GAINS = 1 << 24
"""Numbers in memory at a time when experts' outputs are compared."""


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

    def mask(self, x_TD: Tensor, h_TF: Tensor) -> Tensor:
        """One where a token goes to an expert, else zero; shape (T, E)."""
        if self.router.norm_EN is None:
            return top_mask(x_TD @ self.router.weight_ED.T, self.k)
        return top_mask(_squares(self.partition, self.router.norm_EN, h_TF), self.k)

    def active(self, mask_TE: Tensor) -> Tensor:
        """One where a neuron runs for a token (shared, or in a chosen expert), shape (T, F)."""
        active_TF = mask_TE @ membership(self.partition, self.ffn.num_neurons).T
        active_TF[:, self.partition.shared_S] = 1.0
        return active_TF

    def run(self, h_TF: Tensor, mask_TE: Tensor) -> Tensor:
        """The activations `h_TF`, zero where a neuron does not run."""
        return h_TF * self.active(mask_TE)

    def with_down(self, down_DF: Tensor) -> RoutedFFN:
        """The same with other `down_DF`."""
        return dataclasses.replace(self, ffn=dataclasses.replace(self.ffn, down_DF=down_DF))


def unrouted(ffn: FFN, partition: Partition) -> RoutedFFN:
    """An FFN of which every token runs the shared neurons alone."""
    return RoutedFFN(ffn, partition, Router(ffn.up_FD.new_zeros(0, ffn.hidden_size)), 0)


def unfold(
    routed: RoutedFFN, profile: Profile, cache_bytes: int = 1 << 30
) -> tuple[RoutedFFN, Profile]:
    """The same with every neuron as often as it stands in the partition, which then is disjoint."""
    partition = routed.partition
    num_shared, (num_experts, width) = len(partition.shared_S), partition.experts_EN.shape
    neurons = torch.cat([partition.shared_S, partition.experts_EN.reshape(-1)])
    keep = profile.x_TD.shape[0] * len(neurons) * 4 <= cache_bytes
    h_TF = profile.h_TF[:, neurons] if profile.h_TF is not None and keep else None
    place = torch.arange(len(neurons), device=neurons.device)
    disjoint = Partition(place[:num_shared], place[num_shared:].view(num_experts, width))
    return (
        dataclasses.replace(routed, ffn=routed.ffn.some(neurons), partition=disjoint),
        dataclasses.replace(profile, h_TF=h_TF, energy_F=profile.energy_F[neurons]),
    )


def expert_energies(ffn: FFN, profile: Profile, partition: Partition, part: str) -> Tensor:
    """Summed output energy of each routed expert's neurons on each token of `part`, (T, E)."""
    return torch.cat(
        [energies_of(ffn, partition, h_TF) for _, h_TF, _ in chunks(ffn, profile, part)]
    )


def gains(routed: RoutedFFN, profile: Profile) -> Tensor:
    """Squared output error that each expert takes away on each token, shape (T, E).

    With r the error that is left and c the expert's output: |r + c|^2 - |r|^2 for an expert that
    the router chooses, and for another |r|^2 - |r - c|^2 in the place of the weakest chosen one.
    """
    ffn, partition, parts = routed.ffn, routed.partition, []
    rows = max(1, GAINS // (len(partition.experts_EN) * ffn.hidden_size))
    for x_TD, h_TF, goal_TD in chunks(ffn, profile, "all"):
        mask_TE = routed.mask(x_TD, h_TF)
        left_TD = goal_TD - routed.run(h_TF, mask_TE) @ ffn.down_DF.T
        for part in zip(h_TF.split(rows), left_TD.split(rows), mask_TE.split(rows), strict=True):
            parts.append(_gains(ffn, partition, *part))
    return torch.cat(parts)


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
