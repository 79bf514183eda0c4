"""The values that the stages hand to each other.

Shape legend, used as suffixes on tensor names everywhere: `T` tokens, `D` hidden size, `F` dense
FFN neurons, `S` shared neurons, `E` routed experts, `N` neurons per routed expert, `K` routed
experts per token.

Nothing here imports torch until an FFN is computed: headers alone say what a model can become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from moefy.distributed import ALONE, Group

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ACTIVATIONS = {
    # In place where torch can: fresh memory takes longer than the function itself.
    **dict.fromkeys(("silu", "swish"), ("silu", {"inplace": True})),
    "gelu": ("gelu", {}),
    "relu": ("relu", {"inplace": True}),
    "relu2": ("relu", {"inplace": True}),  # then squared
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), ("gelu", {"approximate": "tanh"})
    ),
}
"""Names of `hidden_act` that the walk can compute: torch's function for each, and its options."""


@dataclass(frozen=True)
class Range:
    """What an option of a partition or a router may be, as an annotation: both ends are legal."""

    least: float
    most: float = 1e9


@dataclass(frozen=True)
class Shape:
    """How one FFN of `num_neurons` is divided: F = S + E * N, of which S + K * N are active.

    Where experts overlap, a neuron standing in several of them, S + E * N is more than F. Where the
    experts are copies, F = S + `granularity` * N.
    """

    num_neurons: int
    num_shared: int
    num_experts: int
    expert_width: int
    experts_per_token: int
    granularity: int = 0
    """Experts that make up one copy of all neurons but the shared ones; 0 where the FFN is divided
    among the experts."""

    @property
    def num_active(self) -> int:
        """Neurons executed per token."""
        return self.num_shared + self.experts_per_token * self.expert_width

    @property
    def active_fraction(self) -> float:
        """Share of the dense FFN's neurons executed per token."""
        return self.num_active / self.num_neurons

    @property
    def num_stored(self) -> int:
        """Neurons in memory."""
        return self.num_shared + self.num_experts * self.expert_width

    @property
    def overlaps(self) -> bool:
        """Whether neurons stand in several experts."""
        return self.num_stored > self.num_neurons

    @property
    def whole(self) -> Shape:
        """The same with whole copies for experts, where these are slices of copies."""
        slices = max(self.granularity, 1)
        return replace(
            self,
            num_experts=self.num_experts // slices,
            expert_width=self.expert_width * slices,
            experts_per_token=self.experts_per_token // slices,
            granularity=min(self.granularity, 1),
        )

    def __str__(self) -> str:
        stored = f", {self.num_stored / self.num_neurons:.2f} x stored" if self.overlaps else ""
        return (
            f"{self.num_shared} shared + {self.num_experts} experts x {self.expert_width}, "
            f"{self.experts_per_token} per token ({self.active_fraction:.1%} of "
            f"{self.num_neurons} active{stored})"
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
        if self.gate_FD is not None:
            return self._act(x_TD @ self.gate_FD.T).mul_(x_TD @ self.up_FD.T)
        h_TF = x_TD @ self.up_FD.T
        return self._act(h_TF if self.bias_F is None else h_TF.add_(self.bias_F))

    def _act(self, h_TF: Tensor) -> Tensor:
        from torch.nn import functional

        name, options = ACTIVATIONS[self.activation]
        answer_TF = getattr(functional, name)(h_TF, **options)
        return answer_TF.square_() if self.activation == "relu2" else answer_TF

    def rounded(self, dtype: torch.dtype) -> FFN:
        """The FFN of the values that `dtype` has for its matrices."""
        return replace(
            self,
            gate_FD=None if self.gate_FD is None else self.gate_FD.to(dtype).float(),
            up_FD=self.up_FD.to(dtype).float(),
            down_DF=self.down_DF.to(dtype).float(),
        )

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


PIECE = 1 << 16
"""Tokens whose inputs are on the device at a time where a router is fitted."""


def pieces(x_TD: Tensor, device: torch.device) -> Iterator[Tensor]:
    """Rows of a tensor that may lie elsewhere, `PIECE` at a time on the device."""
    for x_CD in x_TD.split(PIECE):
        yield x_CD.to(device)


def gram(x_TD: Tensor, device: torch.device) -> Tensor:
    """X'X on the device: float32 products, added up in float64."""
    first, *more = (x_CD.T @ x_CD for x_CD in pieces(x_TD, device))
    return sum(more, first.double())


@dataclass(frozen=True)
class Profile:
    """The inputs one FFN receives from the calibration text, and how it answers them.

    Every token is weighed by the length of the residual stream that leaves the layer: an error
    counts relative to what it is added to, and the few tokens with huge activations do not decide
    for all. Activations and outputs are therefore kept times `scale_T`.

    The last `num_heldout` tokens are whole sequences that nothing is fitted on: they only choose
    between candidates and report errors. Where `h_TF` is none, activations are computed again chunk
    by chunk. `x_TD` and `goal_TD` may lie in host memory while the FFN is on a GPU.
    """

    x_TD: Tensor
    goal_TD: Tensor
    """What the outputs should be, scaled: what the dense FFN answers, and what makes drift good."""
    scale_T: Tensor
    num_heldout: int
    energy_F: Tensor
    """Mean scaled output energy h^2 * |down column|^2 of each neuron over the fitting tokens."""
    h_TF: Tensor | None = None
    gradient_TD: Tensor | None = None
    """Of the dense model's loss with respect to what this FFN writes, over the fitting tokens; on
    the CPU, and only for a partition that asks for it."""
    folded: tuple[FFN, Tensor] | None = None
    """Where the FFN in hand has copies of neurons (`unfold`): one that has each once, whose are the
    activations, and which of its neurons each is, (A,)."""
    release: Callable[[], None] = lambda: None
    """Lets go of what was read of these tensors where they lie in files (see `store`)."""
    group: Group = ALONE
    """The processes whose tokens count, of which these are this one's."""
    length: int = 1
    """Tokens of each sequence; all are whole."""
    sink_F: Tensor | None = None
    """Neurons that write far more at one fitting token than the whole FFN does at the median one:
    they make it an attention sink, and without them nothing after it is right."""

    @property
    def num_fit(self) -> int:
        """Number of tokens to fit on."""
        return self.x_TD.shape[0] - self.num_heldout

    @property
    def device(self) -> torch.device:
        """Where the FFN is computed."""
        return self.scale_T.device

    def span(self, part: str) -> tuple[int, int]:
        """First token of `part` ("fit", "heldout" or "all"), and the one behind its last."""
        total = self.x_TD.shape[0]
        return {"fit": (0, self.num_fit), "heldout": (self.num_fit, total), "all": (0, total)}[part]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The inputs of all processes' tokens: those to fit on, (T, D), and those held out."""
        x_TD, num_fit = self.group.gather(self.x_TD), int(self.group.total(self.num_fit))
        return x_TD[:num_fit], x_TD[num_fit:]

    @cached_property
    def gram_DD(self) -> Tensor:
        """X'X of all processes' inputs to fit on, in float64."""
        return gram(self.inputs()[0], self.device)


@dataclass(frozen=True)
class Partition:
    """Which neurons are always on, and which stand in each routed expert (dense indices).

    A neuron may stand in several experts, but not in one of them and among the shared.
    """

    shared_S: Tensor
    experts_EN: Tensor


@dataclass(frozen=True)
class Router:
    """Linear scores `weight_ED` x, of unit variance over the calibration inputs, or `norm_EN`.

    The terms that may be added to the scores are held by moefy's own class alone.
    """

    weight_ED: Tensor
    norm_EN: Tensor | None = None
    """Score an expert by its neurons' squared activations times these, instead. No stock class
    looks at activations before it chooses, so such a router is for evaluation only."""
    balance: tuple[Mapping[str, float], ...] = ()
    """What evening out the load would have cost, at several strengths."""
    hidden_HD: Tensor | None = None
    """The first of two layers with tanh between them, which add to the scores."""
    output_EH: Tensor | None = None
    """The second."""
    position_PE: Tensor | None = None
    """Added to the scores of the tokens at each place of a sequence; the last row counts for all
    places behind it."""

    def scores(self, x_TD: Tensor, position_T: Tensor | None = None) -> Tensor:
        """The experts' scores on tokens at these places, (T, E)."""
        score_TE = x_TD @ self.weight_ED.T
        if self.hidden_HD is not None and self.output_EH is not None:
            score_TE = score_TE + (x_TD @ self.hidden_HD.T).tanh_() @ self.output_EH.T
        if self.position_PE is not None:
            assert position_T is not None, "this router asks where a token stands"
            score_TE = score_TE + self.position_PE[position_T.clamp(max=len(self.position_PE) - 1)]
        return score_TE
