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

from moefy.finetune import losses
from moefy.targets.target import ROUTER_SCALE

SOFT = ("all", "chosen", "none")
"""Whose outputs a router learns from: those of all experts (a token's gradient tells what each one
would have added, chosen or not), of the chosen ones, or only from losses of its own."""

BIASES = ("e_score_correction_bias", "expert_bias")
"""What stock classes call the bias that moves which experts are chosen, and not their gates."""


@dataclass(frozen=True)
class Explore:
    """How choices are disturbed in training only. All off by default."""

    noise: float = 0.0
    """Standard deviation added to the logits, annealed to zero at `until`."""
    dropout: float = 0.0
    """Chance of an expert to be out of reach for a batch."""
    capacity: float = 0.0
    """Tokens an expert takes, as a multiple of its fair share; the least confident ones go to their
    next best expert, or if that is full as well to none but the shared one. 0 for no end."""
    warm: float = 0.0
    """Share of the tokens whose last choice is the coldest expert instead, up to `until`."""
    until: float = 0.5
    """Share of the training at which noise and warm start have ended."""

    def active(self, progress: float) -> bool:
        """Whether anything disturbs a choice at that share of the training."""
        early = progress < self.until and (self.noise or self.warm)
        return bool(early or self.dropout or self.capacity)


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


def disturbed(explore: Explore, progress: float, z_TE: Tensor, k: int) -> Tensor:
    """Indices of the chosen experts under `explore`, (T, K); -1 where there is no room for any."""
    num_tokens, num_experts = z_TE.shape
    early = 1 - progress / explore.until if progress < explore.until else 0.0
    score_TE = z_TE + torch.randn_like(z_TE) * (explore.noise * early)
    if explore.dropout:
        out_E = torch.rand(num_experts, device=z_TE.device) < explore.dropout
        out_E[torch.randperm(num_experts, device=z_TE.device)[:k]] = False  # enough to choose from
        score_TE = score_TE.masked_fill(out_E, -torch.inf)
    index_TK = score_TE.topk(k, dim=-1).indices
    if explore.warm and early:
        coldest = losses.load(index_TK, num_experts).argmin()
        forced_T = torch.rand(num_tokens, device=z_TE.device) < explore.warm
        forced_T &= (index_TK != coldest).all(-1)
        index_TK[forced_T, -1] = coldest
    if explore.capacity:
        room = max(1, int(explore.capacity * num_tokens * k / num_experts))
        index_TK = within(score_TE, index_TK, room)
    return index_TK


def within(score_TE: Tensor, index_TK: Tensor, room: int) -> Tensor:
    """The choices, such that no expert has more than `room` tokens; -1 for a choice dropped.

    Each expert keeps the tokens that score highest. The others choose once more, of the experts
    that were not full; who comes too late for that is dropped.
    """
    num_experts, k = score_TE.shape[1], index_TK.shape[1]
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, index_TK, True)
    full_E = chosen_TE.sum(0) >= room
    chosen_TE = _most_confident(score_TE, chosen_TE, room)
    left_T = k - chosen_TE.sum(-1)
    other_TE = score_TE.masked_fill(chosen_TE | full_E, -torch.inf)
    rank_TE = other_TE.argsort(-1, descending=True).argsort(-1)
    more_TE = (rank_TE < left_T[:, None]) & other_TE.isfinite()
    taken_E = chosen_TE.sum(0)
    for expert in range(num_experts):
        late = more_TE[:, expert].cumsum(0) > room - taken_E[expert]
        more_TE[late, expert] = False
    chosen_TE |= more_TE
    place_TK = chosen_TE.float().topk(k, dim=-1)
    return torch.where(place_TK.values > 0, place_TK.indices, -1)


def _most_confident(score_TE: Tensor, chosen_TE: Tensor, room: int) -> Tensor:
    """The `room` choices of each expert that score highest."""
    rank_TE = score_TE.masked_fill(~chosen_TE, -torch.inf).argsort(0, descending=True).argsort(0)
    return chosen_TE & (rank_TE < room)


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
    """What is told of a layer: shares of the load, their variation, entropy, dead experts.

    `entropy` is the mean over tokens of that of the router's softmax, in nats. An expert is dead
    below `dead_below` of the mean load.
    """
    share_E = load_E / load_E.sum().clamp(1)
    return {
        "load_E": [round(share, 5) for share in share_E.tolist()],
        "load_cv": float(share_E.std(correction=0) / share_E.mean().clamp(1e-9)),
        "entropy": entropy,
        "dead": int((share_E < dead_below * share_E.mean()).sum()),
    }
