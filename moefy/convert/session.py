"""One attempt at a conversion: what all its stages share."""

from __future__ import annotations

from dataclasses import dataclass

from moefy.convert.prepare import Job
from moefy.distributed import ALONE, Group
from moefy.files.buffers import Store
from moefy.files.resume import State
from moefy.progress import Watch
from moefy.timing import Clock


@dataclass(frozen=True)
class Budget:
    """What `--minutes` comes to on a machine."""

    minutes: float
    tokens: int
    seconds: float  # that these take, as the plan predicts

    @property
    def note(self) -> str:
        """What to tell the user."""
        text = f"--minutes {self.minutes:g}: {self.tokens:,} tokens"
        if self.seconds > 60 * self.minutes:
            text += f", the fewest, which take about {self.seconds / 60:.1f} minutes"
        return text


@dataclass(frozen=True)
class Attempt:
    """How to go about a conversion; nothing here decides the bytes of the result."""

    force: bool = False  # replace OUT, and discard an unfinished conversion of other settings
    restart: bool = False  # discard an unfinished conversion of the same settings, too
    keep: bool = True  # keep what a rerun needs to go on from the last layer that is done
    strict: bool = False  # stop at the first layer whose experts or neurons saw too little text
    memory: int | None = None  # bytes to keep to; states that do not fit lie in files beside OUT
    group: Group = ALONE  # the processes that share the calibration tokens
    budget: Budget | None = None  # where it decided how many tokens these are


@dataclass(frozen=True)
class Session:
    """One attempt at a job by this process."""

    job: Job
    attempt: Attempt
    state: State  # what is on disk for a rerun; nothing in all processes but the first
    store: Store  # where tensors of all tokens lie
    clock: Clock
    watch: Watch
