"""FFNs whose best split is known, and plain loops that judge what is found in them."""

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import moefy
from moefy.convert.profile import Inputs, observe
from moefy.types import FFN, Partition, Profile, Shape

PACKAGE = Path(moefy.__file__).parent
NOT_ROUTED = {"static"}
"""Partitions that make no expert."""


def methods(package: str, function: str) -> dict[str, object]:
    """The public function of every file in a folder of the package, by the file's name."""
    names = sorted(file.stem for file in (PACKAGE / "convert" / package).glob("*.py"))
    return {
        name.replace("_", "-"): getattr(import_module(f"moefy.convert.{package}.{name}"), function)
        for name in names
        if name != "__init__"
    }


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Plant:
    """An FFN with groups of neurons that fire together, and tokens that make them fire."""

    ffn: FFN
    profile: Profile
    shape: Shape
    group_F: np.ndarray
    """The group of each neuron, -1 for those that always fire."""
    chosen_TE: np.ndarray
    """True where a token makes a group fire."""

    @property
    def partition(self) -> Partition:
        """The planted one."""
        groups = [np.flatnonzero(self.group_F == e) for e in range(self.shape.num_experts)]
        shared_S = torch.from_numpy(np.flatnonzero(self.group_F < 0))
        return Partition(shared_S, torch.from_numpy(np.stack(groups)))


def plant(
    seed: int = 0, *, tokens: int = 600, heldout: int = 200, fired: int = 2, noise: float = 1.0
) -> Plant:
    """Eight groups of six neurons, of which each token fires two, and eight that always fire.

    Inputs are a one, an indicator of the groups that fire, and noise, in a random rotation. The
    loss is half of what is written, squared: its gradient is the output.
    """
    shape = Shape(56, 8, 8, 6, fired)
    size = 24
    dice = np.random.default_rng(seed)
    group_F = dice.permutation(np.repeat(np.arange(-1, 8), [8] + [6] * 8))
    chosen_TE = dice.random((tokens, 8)).argsort(1) < fired
    noise_TD = noise * dice.normal(size=(tokens, size - 9))
    plain_TD = np.hstack([np.ones((tokens, 1)), chosen_TE, noise_TD])
    gate_FD = 0.1 * dice.normal(size=(56, size))
    gate_FD[:, 0] += np.where(group_F < 0, 6, -6)
    routed = np.flatnonzero(group_F >= 0)
    gate_FD[routed, 1 + group_F[routed]] += 12
    up_FD = dice.normal(size=(56, size))
    down_DF = dice.normal(size=(size, 56))
    down_DF /= np.linalg.norm(down_DF, axis=0)
    rotation_DD = np.linalg.qr(dice.normal(size=(size, size)))[0]

    def tensor(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    ffn = FFN(tensor(gate_FD @ rotation_DD), tensor(up_FD @ rotation_DD), tensor(down_DF))
    profile = observe(ffn, Inputs(tensor(plain_TD @ rotation_DD), heldout))
    profile = replace(profile, gradient_TD=profile.goal_TD[: profile.num_fit])
    return Plant(ffn, profile, shape, group_F, chosen_TE)


def observed(ffn: FFN, x_TD: torch.Tensor, *, num_heldout: int, **rest: object) -> Profile:
    """A profile with all that a partition may ask for: a gradient, too, that means nothing."""
    gradient_TD = slopes(x_TD, num_heldout)
    return observe(ffn, Inputs(x_TD, num_heldout, gradient_TD=gradient_TD, **rest))


def slopes(x_TD: torch.Tensor, num_heldout: int) -> torch.Tensor:
    """A gradient by lot."""
    return torch.randn(len(x_TD) - num_heldout, x_TD.shape[1], generator=seeded(99))


def recovered(partition: Partition, planted: Plant) -> float:
    """Share of the routed neurons that stand with their group, under the best naming of experts."""
    together_EE = np.zeros((planted.shape.num_experts,) * 2)
    for expert, neurons in enumerate(partition.experts_EN.numpy()):
        for group in planted.group_F[neurons]:
            together_EE[expert, group] += group >= 0
    rows, columns = linear_sum_assignment(together_EE, maximize=True)
    return together_EE[rows, columns].sum() / partition.experts_EN.numel()


def random_ffn(seed: int, num_neurons: int = 48, size: int = 12) -> FFN:
    """An FFN with nothing planted in it."""
    gate_FD, up_FD, down_FD = torch.randn(3, num_neurons, size, generator=seeded(seed))
    return FFN(gate_FD, up_FD, down_FD.T.contiguous())


def energies(ffn: FFN, h_TF: torch.Tensor) -> np.ndarray:
    """Squared length of what each neuron writes for each token, (T, F), in float64."""
    h_TF, down_DF = h_TF.double().numpy(), ffn.down_DF.double().numpy()
    energy_TF = np.empty(h_TF.shape)
    for token, row in enumerate(h_TF):
        energy_TF[token] = ((row * down_DF) ** 2).sum(0)
    return energy_TF


def by_expert(energy_TF: np.ndarray, partition: Partition) -> np.ndarray:
    """Sums over each expert's neurons, (T, E)."""
    return np.stack([energy_TF[:, n].sum(1) for n in partition.experts_EN.numpy()], axis=1)


def squares(h_TF: torch.Tensor, partition: Partition, norm_EN: torch.Tensor) -> np.ndarray:
    """Squared activations of each expert's neurons, times `norm_EN`, summed; (T, E)."""
    h_TF, norm_EN = h_TF.double().numpy(), norm_EN.double().numpy()
    score_TE = np.zeros((len(h_TF), len(norm_EN)))
    for expert, neurons in enumerate(partition.experts_EN.tolist()):
        for place, neuron in enumerate(neurons):
            score_TE[:, expert] += norm_EN[expert, place] * h_TF[:, neuron] ** 2
    return score_TE


def mask_of(score_TE: np.ndarray, k: int) -> np.ndarray:
    """True at the k highest of each row."""
    mask_TE = np.zeros(score_TE.shape, dtype=bool)
    for token, scores in enumerate(score_TE):
        mask_TE[token, np.argsort(-scores, kind="stable")[:k]] = True
    return mask_TE


def captured(energy_TF: np.ndarray, partition: Partition, mask_TE: np.ndarray) -> float:
    """Share of the energy that shared neurons and the chosen experts deliver."""
    routed = (by_expert(energy_TF, partition) * mask_TE).sum()
    return (routed + energy_TF[:, partition.shared_S.numpy()].sum()) / energy_TF.sum()


def best_captured(energy_TF: np.ndarray, partition: Partition, k: int) -> float:
    """The same under the best choice of k experts per token."""
    return captured(energy_TF, partition, mask_of(by_expert(energy_TF, partition), k))
