"""Stop a fine-tune where experts die, or where the loss rises or is not finite."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from moefy.config.finetune import Settings
from moefy.errors import MoefyError

IDLE = 4
"""Multiple of `dead_below` that an expert must have had before training to be missed. One of little
use for a text is now above that share and now below it, and nothing has collapsed."""


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

    Experts that were dead or nearly so before training do not count. Without restarts it only
    checks that the loss is finite.
    """

    settings: Settings
    load_before: Sequence[Sequence[float]] = ()
    """Load of each layer's experts before training, on text of the same sources."""
    failure: Failure | None = None

    def __post_init__(self) -> None:
        steps = self.settings.guard_steps
        self._loads: deque[list[Tensor]] = deque(maxlen=steps)
        self._losses: deque[float] = deque(maxlen=steps)
        self._least = math.inf

    def begin_phase(self) -> None:
        """Forget the losses so far: those of other weights do not compare."""
        self._losses.clear()
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
        steps = self.settings.guard_steps
        if not self.settings.guard_restarts or len(self._losses) < steps:
            return
        mean = sum(self._losses) / len(self._losses)
        self._least = min(self._least, mean)
        if mean > self.settings.guard_loss * self._least:
            reason = f"the loss is {mean:.3g}, and was {self._least:.3g}"
        else:
            reason = self._collapsed()
        if reason:
            self.failure = Failure(step, reason, step - steps)

    def _collapsed(self) -> str | None:
        for layer, loads in enumerate(zip(*self._loads, strict=True)):
            load_E = torch.stack(loads).sum(0)
            share, known = self.settings.dead_below, ""
            dead_E = load_E < share * load_E.mean()
            if self.load_before:
                before_E = torch.tensor(self.load_before[layer]).to(load_E)
                dead_E &= before_E >= IDLE * share * before_E.mean()
                known = f", and had {IDLE * share:.0%} or more before training"
            if dead := int(dead_E.sum()):
                return (
                    f"{dead} of {len(load_E)} experts of MoE layer {layer} got less than "
                    f"{share:.0%} of the mean load over {len(self._loads)} steps{known}"
                )
        return None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after a failure, before a checkpoint of it can be written."""
        if self.failure:
            control.should_training_stop = True
            control.should_save = False
            control.should_evaluate = False
