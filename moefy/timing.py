"""The seconds that the stages of a run take, over all attempts at it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch


class Clock:
    """Adds up seconds by stage, on top of those of `earlier` attempts."""

    def __init__(self, earlier: Mapping[str, float]) -> None:
        self._table = dict(earlier)
        self._total = self._table.pop("total", 0.0)
        self._start = self._since = time.perf_counter()
        self._running: str | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds that the block takes, those of a GPU included."""
        _settle()
        self._running, self._since = name, time.perf_counter()
        yield
        _settle()
        self._table, self._running = self._so_far(), None

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, and in all."""
        return {**self._so_far(), "total": self._total + time.perf_counter() - self._start}

    def _so_far(self) -> dict[str, float]:
        table = dict(self._table)
        if self._running is not None:
            earlier = table.get(self._running, 0.0)
            table[self._running] = earlier + time.perf_counter() - self._since
        return table


def now(device: torch.device) -> float:
    """Seconds of a clock that waits for a GPU: calls return before their kernels are done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _settle() -> None:
    """Wait until a GPU has finished its work: its seconds belong to this stage."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
