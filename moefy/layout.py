"""The values that the stages hand to each other.

Shape legend, used as suffixes on tensor names everywhere: `T` tokens, `D` hidden size, `F` dense
FFN neurons, `S` shared neurons, `E` routed experts, `N` neurons per routed expert, `K` routed
experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
"""Names of `hidden_act` that the walk can compute."""


@dataclass(frozen=True)
class Shape:
    """How one FFN of `num_neurons` is divided: F = S + E * N, of which S + K * N are active."""

    num_neurons: int
    num_shared: int
    num_experts: int
    expert_width: int
    experts_per_token: int

    @property
    def num_active(self) -> int:
        """Neurons executed per token."""
        return self.num_shared + self.experts_per_token * self.expert_width

    @property
    def active_fraction(self) -> float:
        """Share of the dense FFN's neurons executed per token."""
        return self.num_active / self.num_neurons

    def __str__(self) -> str:
        return (
            f"{self.num_shared} shared + {self.num_experts} experts x {self.expert_width}, "
            f"{self.experts_per_token} per token ({self.active_fraction:.1%} of "
            f"{self.num_neurons} active)"
        )


@dataclass(frozen=True)
class FFN:
    """One dense FFN, y = down(act(gate x) * (up x)), or without a gate y = down(act(up x + bias)).

    A bias behind `down` is no part of it: all tokens get it, whichever neurons run.
    """

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    activation: str = "silu"
    bias_F: Tensor | None = None

    @property
    def num_neurons(self) -> int:
        """F."""
        return self.up_FD.shape[0]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.up_FD.shape[1]

    @property
    def down_norm_sq_F(self) -> Tensor:
        """Squared length of what each neuron writes at activation one."""
        return self.down_DF.square().sum(0)

    def activations(self, x_TD: Tensor) -> Tensor:
        """What every neuron answers to `x_TD`: act(gate x) * (up x), shape (T, F)."""
        act = ACTIVATIONS[self.activation]
        if self.gate_FD is not None:
            return act(x_TD @ self.gate_FD.T).mul_(x_TD @ self.up_FD.T)
        h_TF = x_TD @ self.up_FD.T
        return act(h_TF if self.bias_F is None else h_TF.add_(self.bias_F))

    def some(self, neurons: Tensor, dtype: torch.dtype | None = None, scale: float = 1.0) -> FFN:
        """The FFN of some of the neurons, in that order; `down_DF` times `scale`, then cast."""
        dtype = dtype or self.up_FD.dtype
        down_DF = self.down_DF[:, neurons]
        return FFN(
            None if self.gate_FD is None else self.gate_FD[neurons].to(dtype),
            self.up_FD[neurons].to(dtype),
            (down_DF if scale == 1.0 else down_DF * scale).to(dtype),
            self.activation,
            None if self.bias_F is None else self.bias_F[neurons].to(dtype),
        )


def empty_ffn(neurons: int, hidden: int, *, gated: bool = True, biased: bool = True) -> FFN:
    """An FFN of shapes alone, its tensors on no device."""
    with torch.device("meta"):
        matrix_FD = torch.empty(neurons, hidden)
        return FFN(
            matrix_FD if gated else None,
            matrix_FD,
            torch.empty(hidden, neurons),
            bias_F=torch.empty(neurons) if biased and not gated else None,
        )


@dataclass(frozen=True)
class Profile:
    """The inputs one FFN receives from the calibration text, and how it answers them.

    Every token is weighed by the length of the residual stream that leaves the layer: an error
    counts relative to what it is added to, and the few tokens with huge activations do not decide
    for all. Activations and outputs are therefore kept times `scale_T`.

    The last `num_heldout` tokens are whole sequences that nothing is fitted on: they only choose
    between candidates and report errors. `h_TF` is kept when it fits the cache, else activations
    are computed again chunk by chunk.
    """

    x_TD: Tensor
    y_TD: Tensor
    """Dense outputs, scaled."""
    scale_T: Tensor
    num_heldout: int
    energy_F: Tensor
    """Mean scaled output energy h^2 * |down column|^2 of each neuron over the fitting tokens."""
    h_TF: Tensor | None = None

    @property
    def num_fit(self) -> int:
        """Number of tokens to fit on."""
        return self.x_TD.shape[0] - self.num_heldout

    def span(self, part: str) -> tuple[int, int]:
        """First token of `part` ("fit", "heldout" or "all"), and the one behind its last."""
        total = self.x_TD.shape[0]
        return {"fit": (0, self.num_fit), "heldout": (self.num_fit, total), "all": (0, total)}[part]


CHUNK = 2048
"""Tokens whose activations are in memory at a time."""


def chunks(
    ffn: FFN, profile: Profile, part: str = "fit"
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs (T, D), scaled activations (T, F) and scaled dense outputs (T, D) of `part`."""
    start, stop = profile.span(part)
    for first in range(start, stop, CHUNK):
        tokens = slice(first, min(first + CHUNK, stop))
        yield profile.x_TD[tokens], activations(ffn, profile, tokens), profile.y_TD[tokens]


def activations(ffn: FFN, profile: Profile, tokens: slice) -> Tensor:
    """Scaled activations of some of the profile's tokens, shape (T, F)."""
    if profile.h_TF is not None:
        return profile.h_TF[tokens]
    return ffn.activations(profile.x_TD[tokens]).mul_(profile.scale_T[tokens, None])


def observe(
    ffn: FFN,
    x_TD: Tensor,
    *,
    num_heldout: int,
    residual_TD: Tensor | None = None,
    join: Callable[[Tensor], Tensor] | None = None,
    cache_bytes: int = 1 << 30,
) -> Profile:
    """Profile `ffn` on the inputs `x_TD`, of which the last `num_heldout` are held out.

    `residual_TD` is what the output is added to, having gone through `join` where a layer does more
    than add; without it all tokens weigh the same.
    """
    keep = x_TD.shape[0] * ffn.num_neurons * 4 <= cache_bytes
    kept, outputs, scales = [], [], []
    num_fit = x_TD.shape[0] - num_heldout
    total_F = torch.zeros(ffn.num_neurons, dtype=torch.float64, device=x_TD.device)
    for first in range(0, x_TD.shape[0], CHUNK):
        h_TF = ffn.activations(x_TD[first : first + CHUNK])
        y_TD = h_TF @ ffn.down_DF.T
        scale_T = torch.ones_like(y_TD[:, 0])
        if residual_TD is not None:
            added_TD = join(y_TD) if join else y_TD
            leaving_T = (residual_TD[first : first + CHUNK] + added_TD).norm(dim=1)
            scale_T = leaving_T.clamp_min(1e-6).reciprocal_()
            if join:  # an error in the output arrives as much larger as the output itself does
                scale_T *= added_TD.norm(dim=1) / y_TD.norm(dim=1).clamp_min(1e-12)
        h_TF.mul_(scale_T[:, None])
        total_F += h_TF[: max(num_fit - first, 0)].square().sum(0)
        outputs.append(y_TD.mul_(scale_T[:, None]))
        scales.append(scale_T)
        if keep:
            kept.append(h_TF)
    energy_F = (total_F / num_fit).float() * ffn.down_norm_sq_F
    h_TF = torch.cat(kept) if keep else None
    return Profile(x_TD, torch.cat(outputs), torch.cat(scales), num_heldout, energy_F, h_TF)


@dataclass(frozen=True)
class Partition:
    """Which neurons are always on, and which stand in each routed expert (dense indices)."""

    shared_S: Tensor
    experts_EN: Tensor


@dataclass(frozen=True)
class Router:
    """Linear scores `weight_ED`, of unit variance over the calibration inputs, or the oracle."""

    weight_ED: Tensor
    oracle: bool = False
    """Choose by the experts' true output energy instead (an evaluation control)."""


def expert_energies(ffn: FFN, profile: Profile, partition: Partition, part: str) -> Tensor:
    """Summed output energy of each routed expert's neurons on each token of `part`, (T, E)."""
    return torch.cat(
        [energies_of(ffn, partition, h_TF) for _, h_TF, _ in chunks(ffn, profile, part)]
    )


def energies_of(ffn: FFN, partition: Partition, h_TF: Tensor) -> Tensor:
    """Summed h^2 * |down column|^2 over each expert's neurons, shape (T, E)."""
    weight_FE = membership(partition, ffn.num_neurons) * ffn.down_norm_sq_F[:, None]
    return h_TF.square() @ weight_FE


def membership(partition: Partition, num_neurons: int) -> Tensor:
    """One where a neuron stands in an expert, shape (F, E)."""
    num_experts = len(partition.experts_EN)
    member_FE = torch.zeros(num_neurons, num_experts, device=partition.experts_EN.device)
    for expert, neurons in enumerate(partition.experts_EN):
        member_FE[neurons, expert] = 1.0
    return member_FE


def top_mask(score_TE: Tensor, k: int) -> Tensor:
    """One where an expert is among the `k` highest of its token, else zero; shape (T, E)."""
    return torch.zeros_like(score_TE).scatter_(1, score_TE.topk(k, dim=1).indices, 1.0)


def choose(
    ffn: FFN, partition: Partition, router: Router, k: int, x_TD: Tensor, h_TF: Tensor
) -> Tensor:
    """The experts each token goes to, as ones in a (T, E) mask."""
    score_TE = energies_of(ffn, partition, h_TF) if router.oracle else x_TD @ router.weight_ED.T
    return top_mask(score_TE, k)


def active_neurons(partition: Partition, mask_TE: Tensor, num_neurons: int) -> Tensor:
    """One where a neuron runs for a token (shared, or in a chosen expert), shape (T, F)."""
    active_TF = mask_TE @ membership(partition, num_neurons).T
    active_TF[:, partition.shared_S] = 1.0
    return active_TF
