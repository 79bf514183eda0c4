"""The step of least validation loss, whose weights are written."""

from __future__ import annotations

from typing import Any

from moefy.errors import MoefyError
from moefy.finetune.checkpoints import PREFIX, Checkpoints


class Best:
    """A Trainer's methods to choose a step, as `Finetuner` needs them.

    Where there is a last stage, a step of it is chosen: its loss on running text may be higher than
    before, but what it learns is another thing.
    """

    args: Any
    control: Any
    state: Any
    checkpoints: Checkpoints
    first_of_last: int
    """The number of steps before the last stage."""
    _load_from_checkpoint: Any

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save the weights of the least validation loss so far, too."""
        state = self.state
        if (state.best_global_step or 0) <= self.first_of_last < state.global_step:
            state.best_metric = None
        best = super()._determine_best_metric(metrics, trial)  # pyright: ignore[reportAttributeAccessIssue]
        if state.best_global_step == state.global_step:
            self.control.should_save = True
        return best

    def take_best(self) -> dict[str, Any] | None:
        """Take the weights of the step of least validation loss, and tell of the choice.

        None where only the last step was measured, or none.

        Raises:
            MoefyError: code 7, when their checkpoint is damaged.
        """
        state, name = self.state, f"eval_{self.args.metric_for_best_model}"
        measured = {row["step"]: row[name] for row in state.log_history if name in row}
        if self.first_of_last < state.max_steps:
            measured = {n: value for n, value in measured.items() if n > self.first_of_last}
        best = state.best_global_step
        if best is None or len(measured) < 2:
            return None
        if best != state.global_step:
            folder = self.checkpoints.last(best)
            if folder is None or folder.name != f"{PREFIX}{best}":
                raise MoefyError(
                    f"the checkpoint of step {best} in {self.checkpoints.home}, the best one, is "
                    "damaged; --restart starts over",
                    code=7,
                )
            self._load_from_checkpoint(str(folder))
        return {
            "step": best,
            "by": self.args.metric_for_best_model,
            "value": measured[best],
            "last": measured[state.global_step],
        }
