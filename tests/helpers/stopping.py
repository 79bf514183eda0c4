"""A training that is stopped."""

import contextlib
from collections.abc import Iterator

import pytest

from moefy.finetune.trainer import Finetuner


@contextlib.contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """The training in the block is stopped behind a step, as by Ctrl-C, and must come to it."""
    done = Finetuner.step_done

    def stopping(self: Finetuner) -> None:
        done(self)
        if self.state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as planted, pytest.raises(KeyboardInterrupt):
        planted.setattr(Finetuner, "step_done", stopping)
        yield
