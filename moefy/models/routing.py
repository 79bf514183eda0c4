"""The choices of the routers of a loaded model of any class."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

DEAD = 0.05
"""An expert with less than this share of the mean load counts as dead."""


@dataclass(frozen=True)
class MoEBlock:
    """The MoE block of one layer of a loaded model."""

    name: str
    """Of the module."""
    module: nn.Module
    router: nn.Module
    """Gives logits (T, E), weights (T, K) and indices (T, K)."""
    experts: Any
    """The routed experts, without the wrappers that PEFT puts around them."""

    @property
    def layer(self) -> int:
        """The number of the layer."""
        return next(int(part) for part in self.name.split(".") if part.isdecimal())

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts.down_proj)


def moe_blocks(model: Any) -> list[MoEBlock]:
    """The MoE blocks of a model, in order; none if it is dense.

    In every class that moefy writes, a block holds `experts` and beside them the router, as `gate`
    or `router`.
    """
    blocks = []
    for name, module in model.named_modules():
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        experts: Any = getattr(module, "experts", None)
        while hasattr(experts, "base_layer"):  # a wrapper of PEFT
            experts = experts.base_layer
        if isinstance(router, nn.Module) and isinstance(experts, nn.Module):
            blocks.append(MoEBlock(name, module, router, experts))
    return blocks


def routers(model: Any) -> dict[int, nn.Module]:
    """The router of every layer that has one, by the number of the layer."""
    return {block.layer: block.router for block in moe_blocks(model)}


def experts(model: Any) -> dict[int, Any]:
    """The routed experts of every layer that has some, by the number of the layer."""
    return {block.layer: block.experts for block in moe_blocks(model)}


@contextlib.contextmanager
def watched(model: Any, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, logits_TE, index_TK)` after each forward pass of a router of `model`.

    Tokens are flattened, batch by batch. The tensors are part of the graph, so that a loss can use
    the logits. The hooks are removed when the block ends.
    """

    def hook(layer: int, _module: Any, _args: Any, out: Any) -> None:
        see(layer, out[0], out[2])

    with contextlib.ExitStack() as stack:
        for layer, router in routers(model).items():
            stack.enter_context(router.register_forward_hook(partial(hook, layer)))
        yield


@contextlib.contextmanager
def recorded(model: Any) -> Iterator[dict[int, list[Tensor]]]:
    """A dictionary of each layer's choices (T, K), int16, which fills while `model` runs."""
    choices: dict[int, list[Tensor]] = {layer: [] for layer in routers(model)}
    with watched(model, lambda layer, _, index_TK: choices[layer].append(index_TK.to(torch.int16))):
        yield choices


def load(index_TK: Tensor, count: int) -> Tensor:
    """Share of all choices that each expert has, float64 (E,); it sums to one."""
    count_E = torch.bincount(index_TK.flatten().long().cpu(), minlength=count).double()
    return count_E / count_E.sum().clamp_min(1)


def balance(load_E: Tensor, dead_below: float = DEAD) -> dict[str, Any]:
    """The coefficient of variation, the entropy and the number of dead experts of a load.

    The entropy is relative to that of an even load: one if all experts are used alike, zero if one
    takes all.

    >>> balance(torch.tensor([0.5, 0.5, 0.0, 0.0]))["entropy"], balance(torch.ones(4) / 4)["dead"]
    (0.5, 0)
    """
    load_E = load_E.double()
    entropy = -float(torch.special.xlogy(load_E, load_E).sum())
    mean = float(load_E.mean())
    return {
        "load_E": [round(float(share), 6) for share in load_E],
        "load_cv": float(load_E.std(correction=0)) / mean if mean else 0.0,
        "entropy": entropy / math.log(len(load_E)) if len(load_E) > 1 else 1.0,
        "dead": int((load_E < dead_below * mean).sum()),
    }


def drift(load_E: Tensor, reference_E: Tensor) -> float:
    """The total variation distance of two loads: the share of choices that go elsewhere, 0 to 1."""
    return float((load_E.double() - reference_E.double()).abs().sum()) / 2
