"""Timed rounds: models take turns on the same text, and ratios to dense are taken within a round.

A machine that slows down slows all models of a round. Medians over rounds are reported, with the
lowest and the highest.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PHASES: tuple[str, ...] = ("prefill", "decode")

Seconds = dict[tuple[str, int, int], dict[str, list[float]]]
"""Seconds in each round, by phase, batch size and context length, and by label."""


@dataclass(frozen=True)
class Grid:
    """The batch sizes and context lengths that speed is measured at."""

    work: tuple[tuple[int, int], ...]
    """Pairs of a batch size and a context length."""
    rounds: int = 3
    """At most; slow pairs get fewer, see `speed.LONG`."""
    new_tokens: int = 8
    trial: int = 64
    """Tokens per sequence on which ways to compute are compared."""
    most_tried: int = 512
    """The same, in all sequences of a batch."""
    graphs: int = 0
    """The largest batch at which decoding by CUDA graphs is tried."""
    warm: bool = False
    """Whether every pair runs once before, and is left out where memory does not hold it."""

    @property
    def batches(self) -> list[int]:
        """The batch sizes in ascending order."""
        return sorted({batch for batch, _ in self.work})


GRIDS = {
    "quick": Grid(((1, 128),), rounds=3),
    "usual": Grid(((1, 128), (1, 512), (8, 128), (32, 128)), rounds=3),
    "full": Grid(
        ((1, 128), (1, 512), (1, 1536), (8, 128), (8, 512), (32, 128), (32, 512)),
        rounds=5,
        new_tokens=16,
    ),
}
"""On a processor, by the effort of a report."""

GPU_WORK = {
    "quick": ((1, 512),),
    "usual": ((1, 512), (1, 4096), (8, 512), (32, 512), (128, 512), (256, 512)),
    "full": (
        *((1, 512), (1, 4096), (8, 512), (8, 4096), (32, 512), (32, 4096)),
        *((128, 512), (256, 512), (256, 4096)),
    ),
}
"""Pairs of a batch size and a context length on a GPU, which a short prompt leaves idle."""


def grid_for(effort: str, kind: str, longest: int) -> Grid:
    """What speed is measured on for a kind of device, with models that take `longest` tokens."""
    full = effort == "full"
    grid = GRIDS[effort]
    if kind != "cpu":
        grid = Grid(
            GPU_WORK[effort],
            rounds=5 if full else 3,
            new_tokens=32 if full else 16,
            trial=512,
            most_tried=2**17,
            graphs=0 if effort == "quick" else 32,
            warm=True,
        )
    most = max(1, longest - grid.new_tokens)
    fitting = dict.fromkeys((batch, min(context, most)) for batch, context in grid.work)
    return dataclasses.replace(grid, work=tuple(fitting), trial=min(grid.trial, most))


def stretches(ids_T: Tensor, batch: int, length: int, turn: int) -> Tensor:
    """`batch` stretches of the text, evenly spread and different in every round, (B, T)."""
    room = max(len(ids_T), 1)
    starts = [(turn * 101 + number * room // batch) % room for number in range(batch)]
    around_T = ids_T.repeat(1 + (length + room - 1) // room)
    return torch.stack([around_T[at : at + length] for at in starts])


def cores(start: float, spent: float) -> float:
    """Processor seconds per second since `time.perf_counter()` and `process_time()` were these.

    About one or more on a quiet machine. Less means that other programs took the processor away,
    and that the speeds are unreliable.
    """
    return (time.process_time() - spent) / max(time.perf_counter() - start, 1e-9)


def timed(
    labels: Sequence[str],
    work: Sequence[Any],
    rounds: int,
    run: Callable[[str, Any, int], Mapping[tuple[str, int, int], float]],
    *,
    longest: float = float("inf"),
    watch: Callable[[int, int], None],
) -> Seconds:
    """Seconds of all models in turn; `run` takes a label, a piece of work and the round.

    Round 0 only warms up, with the first piece of work. A piece of work that took more than
    `longest` seconds in two rounds gets no third one.
    """
    seconds: Seconds = {}
    total = dict.fromkeys(work, 0.0)
    steps = [(0, work[0]), *((turn, piece) for turn in range(1, rounds + 1) for piece in work)]
    for done, (turn, piece) in enumerate(steps, 1):
        if turn > 2 and total[piece] > longest:
            continue
        for label in labels:
            for key, value in run(label, piece, turn).items():
                if turn:
                    total[piece] += value
                    seconds.setdefault(key, {}).setdefault(label, []).append(value)
        watch(done, len(steps))
    return seconds


def speed_rows(seconds: Seconds, new_tokens: int) -> list[dict[str, Any]]:
    """Tokens per second and the ratio to dense; the first label of each entry is dense."""
    return [
        {"phase": phase, "batch": batch, "context": context, **row}
        for (phase, batch, context), by_label in seconds.items()
        for row in label_rows(by_label, batch * (context if phase == "prefill" else new_tokens))
    ]


def label_rows(seconds: Mapping[str, Sequence[float]], tokens: int) -> list[dict[str, Any]]:
    """One row for each label from the seconds that `tokens` took in each round."""
    dense = next(iter(seconds.values()))
    rows = []
    for label, own in seconds.items():
        speeds = [tokens / value for value in own]
        ratios = [theirs / value for value, theirs in zip(own, dense, strict=True)]
        rows.append(
            {
                "label": label,
                "tokens_per_second": statistics.median(speeds),
                "low": min(speeds),
                "high": max(speeds),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "rounds": len(own),
            }
        )
    return rows
