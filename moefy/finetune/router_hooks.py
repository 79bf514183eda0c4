"""Hooks on the routers and experts of a loaded model: they record choices and give gradients.

In every stock MoE block a router returns (logits, gates, indices), and stacked experts take
(tokens, indices, gates). moefy writes router rows small (`ROUTER_SCALE`), so that every gate is
one. All logits here are those of the rows before that, whose softmax means something. In training
the forward pass is the written one with constant gates, and the gradient is that of a soft choice.
The saved model holds none of this. Where experts are copies, rows are written as they are: gates
are softmax weights, and routers learn from these as the class itself does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moefy.config.finetune import Settings
from moefy.finetune import losses
from moefy.finetune.losses import Routed
from moefy.finetune.router_noise import is_noisy, noisy_choices
from moefy.models.routing import balance, moe_blocks
from moefy.models.targets.target import ROUTER_SCALE

BIASES = ("e_score_correction_bias", "expert_bias")
"""Names in stock classes of the selection bias: it changes the chosen experts, not their gates."""


@dataclass
class Layer:
    """One MoE block: its parts, and what its router did in the last forward pass."""

    name: str
    block: nn.Module
    router: nn.Module
    experts: Any
    logits_TE: Tensor | None = None
    index_TK: Tensor | None = None
    soft_TE: Tensor | None = None
    energy_TE: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Number of routed experts."""
        return len(self.experts.down_proj)

    @property
    def bias_E(self) -> Tensor | None:
        """The selection bias, where the class has one."""
        tensors = [*self.block.named_buffers(), *self.block.named_parameters()]
        return next((t.view(-1) for name, t in tensors if name.endswith(BIASES)), None)

    @property
    def learned(self) -> list[tuple[nn.Parameter, bool]]:
        """The router's parameters, and whether each is written small, as what adds to scores is."""
        return [
            (parameter, name != "hidden")
            for name, parameter in self.router.named_parameters()
            if not name.endswith(BIASES)
        ]


def moe_layers(model: nn.Module) -> list[Layer]:
    """The MoE blocks of a model, in order; none for a dense one."""
    return [Layer(b.name, b.module, b.router, b.experts) for b in moe_blocks(model)]


class Routing:
    """Hooks on the routers and experts of a model.

    `router_gradient` says from whose outputs a router learns: `all` experts (a token's gradient
    says what each one would have added, chosen or not), the `chosen` ones, or `none` but its own
    losses. Of `copies` the chosen ones stand for all.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings = Settings(),  # noqa: B008 - frozen
        *,
        copies: bool = False,
    ) -> None:
        self.layers = moe_layers(model)
        self.copies, self.scale = copies, 1.0 if copies else ROUTER_SCALE
        self.settings, self.soft = settings, settings.router_gradient
        self._energy = losses.ENERGY in losses.needs(settings)
        self.progress = 0.0
        """Share of the training that is done."""
        self.experts_per_token: int | None = None
        """In training, where that is not the model's own; each gate is then `gate`."""
        self.gate = 1.0
        self._recording = False
        for layer in self.layers:
            layer.router.register_forward_hook(partial(self._routed, layer))
            layer.experts.register_forward_hook(partial(self._computed, layer))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Layer]]:
        """Record in the layers what the routers do in the block, but not in recomputed passes."""
        self._recording = True
        try:
            yield self.layers
        finally:
            self._recording = False

    def clear(self) -> None:
        """Release the records and their autograd graphs."""
        for layer in self.layers:
            layer.logits_TE = layer.index_TK = layer.soft_TE = layer.energy_TE = None

    def _routed(self, layer: Layer, router: nn.Module, args: Any, out: Any) -> Any:
        logits_TE, gate_TK, index_TK = out
        z_TE = logits_TE.float() / self.scale
        if router.training and self.copies:
            gate_TK, index_TK = self._weighted(z_TE, gate_TK, index_TK)
        elif router.training:
            if k := self.experts_per_token:
                index_TK = z_TE.topk(k, dim=-1).indices
                gate_TK = torch.full_like(index_TK, self.gate, dtype=gate_TK.dtype)
            if is_noisy(self.settings, self.progress):
                k = index_TK.shape[1]
                chosen = noisy_choices(self.settings, self.progress, z_TE.detach(), k)
                # All gates are the same, but for the little that small logits leave.
                gate_TK = gate_TK.detach().mean(-1, keepdim=True) * (chosen >= 0)
                index_TK = chosen.clamp(0)
            gate_TK = gate_TK.detach()
            if self.soft == "chosen":
                soft_TK = z_TE.softmax(-1).gather(1, index_TK) * index_TK.shape[1]
                gate_TK = gate_TK * (1 + soft_TK - soft_TK.detach()).to(gate_TK.dtype)
            if self.soft == "all":
                layer.soft_TE = z_TE.softmax(-1) * index_TK.shape[1]
        if self._recording:
            layer.logits_TE = z_TE
            layer.index_TK = torch.where(gate_TK > 0, index_TK, -1)
        return logits_TE, gate_TK, index_TK

    def _weighted(self, z_TE: Tensor, gate_TK: Tensor, index_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Gates of copies in training, and which copies: those of the class, but for noise."""
        if is_noisy(self.settings, self.progress):
            chosen = noisy_choices(self.settings, self.progress, z_TE.detach(), index_TK.shape[1])
            index_TK = chosen.clamp(0)
            share_TK = z_TE.softmax(-1).gather(1, index_TK) * (chosen >= 0)
            share_TK = share_TK / share_TK.sum(-1, keepdim=True).clamp_min(1e-12)
            gate_TK = share_TK.to(gate_TK.dtype)
        return gate_TK.detach() if self.soft == "none" else gate_TK, index_TK

    def _computed(self, layer: Layer, experts: Any, args: Any, out: Tensor) -> Tensor:
        energy = self._recording and self._energy
        soft = self.soft == "all" and not self.copies
        soft = soft and experts.training and torch.is_grad_enabled()
        if not (soft or energy):
            return out
        x_TD, gate_TK = args[0].detach(), next(t for t in args[1:] if t.is_floating_point())
        with torch.no_grad():
            h_TEN = activations(experts, x_TD)
            if energy:
                norm_EN = experts.down_proj.float().square().sum(1)
                layer.energy_TE = torch.einsum("ten,en->te", h_TEN.float().square(), norm_EN)
        if not soft:
            return out
        gate = gate_TK.detach().max()
        return _SoftGates.apply(out, layer.soft_TE, h_TEN, experts.down_proj.detach(), gate)


class _SoftGates(torch.autograd.Function):
    """Returns the output as it is, and gives the soft gates the gradient of all experts.

    Source: Yao et al., 2025, DenseMixer. Here no unused output is computed: the gradient of expert
    e's gate is (down_e^T dy) . h_e.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, y_TD: Tensor, soft_TE: Tensor, h_TEN: Tensor, down_EDN: Tensor, gate: Tensor
    ) -> Tensor:
        ctx.save_for_backward(h_TEN, down_EDN, gate)
        return y_TD.view_as(y_TD)

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        h_TEN, down_EDN, gate = ctx.saved_tensors
        # One product for all experts: many small ones take several times as long.
        down_DM = down_EDN.transpose(0, 1).flatten(1)
        slope_TE = ((dy_TD @ down_DM).view_as(h_TEN) * h_TEN).sum(-1, dtype=torch.float32)
        return dy_TD, slope_TE * gate, None, None, None


def activations(experts: Any, x_TD: Tensor) -> Tensor:
    """Activations of all experts' neurons on all tokens, (T, E, N)."""
    if hasattr(experts, "activations"):  # moefy's own class, whose experts may have no gate
        each = [experts.activations(number, x_TD) for number in range(len(experts.down_proj))]
        return torch.stack(each, 1)
    rows_ED = experts.gate_up_proj
    both_TEM = nn.functional.linear(x_TD, rows_ED.flatten(0, 1)).view(-1, *rows_ED.shape[:2])
    gate_TEN, up_TEN = both_TEM.chunk(2, dim=-1)
    return experts.act_fn(gate_TEN) * up_TEN


def update_bias(
    layer: Layer, load_E: Tensor, rate: float, router_scale: float = ROUTER_SCALE
) -> None:
    """Move the selection bias towards balance by `rate`, in units of the unscaled logits.

    The bias is added to sigmoids of small logits (slope 1/4) or, in one class, to their softmax
    (slope about 1/E). So it is as small as they are.

    Source: Wang et al., 2024, arXiv:2408.15664.
    """
    bias_E = layer.bias_E
    if bias_E is not None:
        slope = 1 / len(bias_E) if hasattr(layer.router, "moe_statics") else 1 / 4
        step_E = torch.sign(load_E.mean() - load_E) * rate * router_scale * slope
        bias_E.data += step_E.to(bias_E)


class RouterStatistics:
    """Loads and entropies of the routers, summed over batches."""

    def __init__(self, dead_below: float) -> None:
        self.dead_below = dead_below
        self.loads: list[Tensor] = []
        self._entropies: list[Any] = []
        self._weight = 0.0

    def add(self, layers: Sequence[Routed], weight: float = 1.0) -> None:
        """Add a batch; `weight` is its weight in the mean entropy."""
        self._weight += weight
        if not self.loads:
            self.loads = [torch.zeros_like(layer.load_E) for layer in layers]
            self._entropies = [0.0] * len(layers)
        for number, layer in enumerate(layers):
            self.loads[number] += layer.load_E
            log_p_TE = layer.logits_TE.detach().log_softmax(-1)
            entropy = -(log_p_TE.exp() * log_p_TE).sum(-1).mean()
            self._entropies[number] += weight * entropy.double()

    def layers(self) -> list[dict[str, Any]]:
        """A row per layer, as `routing.balance` gives it, but with the entropy of the router.

        That is the mean over tokens of its softmax's, in nats. An expert is dead below
        `dead_below` of the mean load.
        """
        return [
            {
                "layer": number,
                **balance(load_E / load_E.sum().clamp(1), self.dead_below),
                "entropy": float(entropy) / self._weight,
            }
            for number, (load_E, entropy) in enumerate(
                zip(self.loads, self._entropies, strict=True)
            )
        ]


def over_layers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean variation of the load, mean entropy and number of dead experts of the rows of
    `RouterStatistics.layers`; nothing for no row."""
    if not rows:
        return {}
    return {
        "load_cv": sum(row["load_cv"] for row in rows) / len(rows),
        "entropy": sum(row["entropy"] for row in rows) / len(rows),
        "dead": sum(row["dead"] for row in rows),
    }
