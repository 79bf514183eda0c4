"""What the routers of a loaded model do, and how they learn, by hooks on stock modules.

Every stock MoE block has a router, which gives (logits, gates, indices), and stacked experts, which
are given (tokens, indices, gates). moefy's router rows are written small (`ROUTER_SCALE`), so that
every gate is one; everything here is in the logits of the rows before that, whose softmax means
something. In training a router's forward is as written, its gates constants; its gradient is that
of a soft choice (see `SOFT`). Nothing of this is in the model that is saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moefy.finetune.router_noise import Explore, disturbed
from moefy.models.routing import balance
from moefy.models.targets.target import ROUTER_SCALE

SOFT = ("all", "chosen", "none")
"""Whose outputs a router learns from: those of all experts (a token's gradient tells what each one
would have added, chosen or not), of the chosen ones, or only from losses of its own."""

BIASES = ("e_score_correction_bias", "expert_bias")
"""What stock classes call the bias that moves which experts are chosen, and not their gates."""


@dataclass
class Layer:
    """One MoE block: its parts, and what its router did last."""

    name: str
    block: nn.Module
    router: nn.Module
    experts: Any
    logits_TE: Tensor | None = None
    index_TK: Tensor | None = None
    soft_TE: Tensor | None = None
    worth_TE: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts.down_proj)

    @property
    def bias_E(self) -> Tensor | None:
        """The selection bias, where the class has one."""
        tensors = [*self.block.named_buffers(), *self.block.named_parameters()]
        return next((t.view(-1) for name, t in tensors if name.endswith(BIASES)), None)

    @property
    def rows(self) -> nn.Parameter:
        """The router's rows, as they are written."""
        return next(p for n, p in self.router.named_parameters() if not n.endswith(BIASES))


def layers(model: nn.Module) -> list[Layer]:
    """The MoE blocks of a model, in order; none for a dense one."""
    found = []
    for name, module in model.named_modules():
        experts: Any = getattr(module, "experts", None)
        while hasattr(experts, "base_layer"):  # PEFT's wrappers, whose sum is inside at work
            experts = experts.base_layer
        if isinstance(getattr(experts, "down_proj", None), Tensor):
            router: Any = module.gate if hasattr(module, "gate") else module.router
            found.append(Layer(name, module, router, experts))
    return found


class Routing:
    """Hooks on the routers and experts of a model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        soft: str = "all",
        explore: Explore = Explore(),  # noqa: B008 - frozen
        worth: bool = False,
    ) -> None:
        self.layers = layers(model)
        self.soft, self.explore, self.worth = soft, explore, worth
        self.progress = 0.0
        """Share of the training that is done."""
        self._recording = False
        for layer in self.layers:
            layer.router.register_forward_hook(partial(self._routed, layer))
            layer.experts.register_forward_hook(partial(self._computed, layer))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Layer]]:
        """Keep in the layers what the routers do in the block; a recomputed forward is not kept."""
        self._recording = True
        try:
            yield self.layers
        finally:
            self._recording = False

    def forget(self) -> None:
        """Let go of what was kept, and of the graphs that hang on it."""
        for layer in self.layers:
            layer.logits_TE = layer.index_TK = layer.soft_TE = layer.worth_TE = None

    def _routed(self, layer: Layer, router: nn.Module, args: Any, out: Any) -> Any:
        logits_TE, gate_TK, index_TK = out
        z_TE = logits_TE.float() / ROUTER_SCALE
        if router.training:
            if self.explore.active(self.progress):
                chosen = disturbed(self.explore, self.progress, z_TE.detach(), index_TK.shape[1])
                # Every gate is the same, but for the little that small logits leave.
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

    def _computed(self, layer: Layer, experts: Any, args: Any, out: Tensor) -> Tensor:
        wanted = self._recording and self.worth
        soft = experts.training and self.soft == "all" and torch.is_grad_enabled()
        if not (soft or wanted):
            return out
        x_TD, gate_TK = args[0].detach(), max(args[1:], key=torch.is_floating_point)
        with torch.no_grad():
            h_TEN = activations(experts, x_TD)
            if wanted:
                norm_EN = experts.down_proj.float().square().sum(1)
                layer.worth_TE = torch.einsum("ten,en->te", h_TEN.float().square(), norm_EN)
        if not soft:
            return out
        gate = gate_TK.detach().max()
        return _Worth.apply(out, layer.soft_TE, h_TEN, experts.down_proj.detach(), gate)


class _Worth(torch.autograd.Function):
    """Passes the output on, and gives the soft gates the gradient that all experts would give.

    Source: Yao et al., 2025, DenseMixer; here without computing outputs that are not used: the
    slope of expert e's gate is (down_e^T dy) . h_e.
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
    """What the neurons of all experts answer to all tokens, (T, E, N)."""
    if hasattr(experts, "activations"):  # moefy's own class, whose experts may have no gate
        found = [experts.activations(number, x_TD) for number in range(len(experts.down_proj))]
        return torch.stack(found, 1)
    rows_ED = experts.gate_up_proj
    both_TEM = nn.functional.linear(x_TD, rows_ED.flatten(0, 1)).view(-1, *rows_ED.shape[:2])
    gate_TEN, up_TEN = both_TEM.chunk(2, dim=-1)
    return experts.act_fn(gate_TEN) * up_TEN


def even_out(layer: Layer, load_E: Tensor, rate: float) -> None:
    """Move the selection bias towards balance by `rate`, in units of the unscaled logits.

    Source: Wang et al., 2024, arXiv:2408.15664; the bias is added to sigmoids (slope 1/4) or, in
    one class, to softmax shares (slope about 1/E) of small logits, so it is as small as they are.
    """
    bias_E = layer.bias_E
    if bias_E is not None:
        slope = 1 / len(bias_E) if hasattr(layer.router, "moe_statics") else 1 / 4
        step_E = torch.sign(load_E.mean() - load_E) * rate * ROUTER_SCALE * slope
        bias_E.data += step_E.to(bias_E)


def figures(load_E: Tensor, entropy: float, dead_below: float) -> dict[str, Any]:
    """What is told of a layer: as `routing.balance`, but with the entropy of the router.

    That is the mean over tokens of its softmax's, in nats. An expert is dead below `dead_below` of
    the mean load.
    """
    return balance(load_E / load_E.sum().clamp(1), dead_below) | {"entropy": entropy}
