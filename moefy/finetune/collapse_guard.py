"""Stop a fine-tune where experts die, or where the loss rises or is not finite."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from moefy.errors import MoefyError


@dataclass(frozen=True)
class Failure:
    """Why the guard stopped a training."""

    step: int
    reason: str
    last_good_step: int


def check_start(loss: float) -> None:
    """Refuse to train a model whose loss before training is not finite.

    Raises:
        MoefyError: code 6.
    """
    if not math.isfinite(loss):
        raise MoefyError(
            f"the validation loss before training is {loss}; expected finite weights, or a "
            "--compute-dtype that holds its values; nothing was written; `moefy verify RUN` looks "
            "for damage",
            code=6,
        )


@dataclass
class CollapseGuard(TrainerCallback):
    """Checks the loss and the load of the experts at every step.

    Experts that were dead before training do not count.
    """

    steps: int
    dead_below: float
    most_loss: float
    """As a multiple of the least mean loss so far."""
    dead_before: list[int] = field(default_factory=list)
    """Dead experts of each layer before training."""
    enabled: bool = True
    """Without this it only checks that the loss is finite."""
    failure: Failure | None = None

    def __post_init__(self) -> None:
        self._loads: deque[list[Tensor]] = deque(maxlen=self.steps)
        self._losses: deque[float] = deque(maxlen=self.steps)
        self._least = math.inf

    def observe(self, step: int, loss: float, load_LE: list[Tensor]) -> None:
        """Add one step, and set `failure` if training goes wrong."""
        self._loads.append(load_LE)
        self._losses.append(loss)
        if self.failure:
            return
        if not math.isfinite(loss):
            self.failure = Failure(step, f"the loss is {loss}", step - 1)
            return
        if not self.enabled or len(self._losses) < self.steps:
            return
        mean = sum(self._losses) / len(self._losses)
        self._least = min(self._least, mean)
        if mean > self.most_loss * self._least:
            reason = f"the loss is {mean:.3g}, and was {self._least:.3g}"
            self.failure = Failure(step, reason, step - self.steps)
        elif reason := self._collapsed():
            self.failure = Failure(step, reason, step - self.steps)

    def _collapsed(self) -> str | None:
        for layer, loads in enumerate(zip(*self._loads, strict=True)):
            load_E = torch.stack(loads).sum(0)
            dead = int((load_E < self.dead_below * load_E.mean()).sum())
            before = self.dead_before[layer] if self.dead_before else 0
            if dead > before:
                return (
                    f"{dead} of {len(load_E)} experts of MoE layer {layer} got less than "
                    f"{self.dead_below:.0%} of the mean load over {self.steps} steps"
                    f" (before training: {before})"
                )
        return None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after a failure, before a checkpoint of it can be written."""
        if self.failure:
            control.should_training_stop = True
            control.should_save = False
            control.should_evaluate = False
