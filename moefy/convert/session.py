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
class Attempt:
    """How to go about a conversion; nothing here decides the bytes of the result."""

    force: bool = False
    """Replace OUT, and discard an unfinished conversion of other settings."""
    restart: bool = False
    """Discard an unfinished conversion of the same settings, too."""
    keep: bool = True
    """Keep what a rerun needs to go on from the last layer that is done."""
    strict: bool = False
    """Stop at the first layer of which an expert or a neuron has seen too little text."""
    memory: int | None = None
    """Bytes to keep to; where the states of all tokens do not fit, they lie in files beside OUT."""
    group: Group = ALONE
    """The processes that share the calibration tokens."""


@dataclass(frozen=True)
class Session:
    """One attempt at a job by this process."""

    job: Job
    attempt: Attempt
    state: State
    """What is on disk for a rerun; nothing in all processes but the first."""
    store: Store
    """Where tensors of all tokens lie."""
    clock: Clock
    watch: Watch

    @property
    def group(self) -> Group:
        """The processes that share the calibration tokens."""
        return self.attempt.group
