"""Annealed sparsity: a training that begins where the student is the teacher.

All experts are on, and `down_proj` is the dense model's: that is the dense model. Over the first
steps the experts per token fall from all E to the K of the run, and the refit, which makes up for
those that are off, is blended in with them: W + a (W_refit - W) with a = (E - k) / (E - K).

`down_proj` is trained meanwhile. So its share of the refit is added in steps, to what the optimizer
steps as well, and its moments stay: they are of the gradient, which no constant changes. All is a
function of the step alone, so a checkpoint needs to hold nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Start:
    """Where an annealed training begins."""

    unrefitted: Callable[[Any], Mapping[str, Tensor]]
    """The parameters of a model that a refit has changed, by name, as they were before."""
    num_experts: int
    """E."""
    experts_per_token: int
    """K, at the end."""
    gate: float
    """What a chosen expert's output is multiplied by."""


@dataclass(frozen=True)
class Annealing:
    """How many experts are on at a step, and how much of the refit is in the weights."""

    start: Start
    num_steps: int
    """After so many the run is as it is written."""
    refits: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    """What the refit has added to each parameter, float32."""

    def experts(self, step: int) -> int:
        """Experts per token at a step, the first of which is 0."""
        most, least = self.start.num_experts, self.start.experts_per_token
        if step >= self.num_steps:
            return least
        return most - (most - least) * step // self.num_steps

    def blend(self, step: int) -> float:
        """The share of the refit that is in the weights at a step."""
        most, least = self.start.num_experts, self.start.experts_per_token
        return (most - self.experts(step)) / (most - least) if step >= 0 else 0.0

    def added(self, step: int) -> float:
        """The share of the refit that is added at a step."""
        return self.blend(step) - self.blend(step - 1)

    @torch.no_grad()
    def add(self, share: float, copies: Mapping[int, Tensor]) -> None:
        """Add a share of the refit to the weights, and to their float32 copies, by the id of the
        weight, where the optimizer has such."""
        for weight, refit in self.refits:
            copy = copies.get(id(weight), weight)
            copy.add_(refit.to(copy.dtype), alpha=share)
            if copy is not weight:
                weight.copy_(copy)


@torch.no_grad()
def begin(start: Start, model: Any, num_steps: int) -> Annealing:
    """Take the refit out of a model as it was written; what adds it again."""
    refits = []
    before, parameters = start.unrefitted(model), dict(model.named_parameters())
    for name, tensor in before.items():
        weight = parameters[name]
        tensor = tensor.to(weight.device)
        refits.append((weight, weight.float() - tensor.float()))
        weight.copy_(tensor)
    return Annealing(start, num_steps, refits)
