"""Tokens per second in transformers: dense against MoE, in turns, with what arithmetic allows.

Every round runs every model on the same real text, prefill first and then decoding from the cache
that it left, so that a machine that slows down slows all. The ratio to dense is taken within the
round; medians over rounds are told, with the lowest and the highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moefy.compute import name_of
from moefy.evaluate.implementations import PHASES, Clock, Grid, Work, fastest, fastest_round

LONG = 15.0
"""Seconds in all rounds, of all models: a piece of work that took as long gets no third round, for
it is an average over much in itself."""

Row = dict[str, Any]


def measure(
    models: Mapping[str, Callable[[torch.dtype], Any]],
    ids_T: Tensor,
    grid: Grid,
    *,
    dtypes: Sequence[torch.dtype],
    clock: Clock = time.perf_counter,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Speed of `models`, the first of which is dense, on stretches of the text `ids_T`.

    `models` are functions that open one in a dtype. Each runs in the one of `dtypes` that is
    fastest for it, by phase and batch size.
    """
    start, spent = time.perf_counter(), time.process_time()
    opened = {
        label: fastest(open_in, dtypes, ids_T, grid, clock) for label, open_in in models.items()
    }
    seconds: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    total = dict.fromkeys(grid.work, 0.0)
    steps = schedule(grid.work, grid.rounds)
    for done, (turn, (batch, context)) in enumerate(steps, 1):
        if turn > 2 and total[batch, context] > LONG:
            continue
        for label, model in opened.items():
            took = fastest_round(model, ids_T, batch, context, grid, turn, clock)
            total[batch, context] += sum(took) if turn else 0.0
            for phase, value in zip(PHASES, took, strict=True):
                if turn:
                    rows = seconds.setdefault((phase, batch, context), {})
                    rows.setdefault(label, []).append(value)
        watch(done, len(steps))
    rows = []
    for (phase, batch, context), took in seconds.items():
        tokens = batch * (context if phase == "prefill" else grid.new_tokens)
        for row in speed_rows(took, tokens):
            model = opened[row["label"]]
            dtype, way = model.dtypes[phase, batch], model.way((phase, batch))
            found = {"phase": phase, "batch": batch, "context": context, **row}
            rows.append(found | {"dtype": name_of(dtype), "way": way})
    ways = {
        label: {work: way for work in model.dtypes if (way := model.way(work))}
        for label, model in opened.items()
    }
    return {
        "implementation": {label: _told(found) for label, found in ways.items() if found},
        "left_out": {label: model.left_out for label, model in opened.items() if model.left_out},
        "threads": torch.get_num_threads(),
        "cores": cores(start, spent),
        "dtype": {
            label: _told({work: name_of(dtype) for work, dtype in model.dtypes.items()})
            for label, model in opened.items()
        },
        "rounds": grid.rounds,
        "new_tokens": grid.new_tokens,
        "rows": sorted(rows, key=lambda row: (row["phase"] == "decode", row["batch"])),
    }


def schedule(work: Sequence[Any], rounds: int) -> list[tuple[int, Any]]:
    """What to do in which round; round 0 only warms up, by the first piece of work.

    >>> schedule(["short", "long"], 2)
    [(0, 'short'), (1, 'short'), (1, 'long'), (2, 'short'), (2, 'long')]
    """
    return [(0, work[0]), *((turn, one) for turn in range(1, rounds + 1) for one in work)]


def cores(start: float, spent: float) -> float:
    """Processor seconds per second since `time.perf_counter()` and `process_time()` were these.

    At least about one when nothing else runs; less where other programs took the processor away,
    and then speeds say little.
    """
    return (time.process_time() - spent) / max(time.perf_counter() - start, 1e-9)


def speed_rows(seconds: Mapping[str, Sequence[float]], tokens: int) -> list[Row]:
    """One piece of work's rows by label, the first being dense, from seconds in each round."""
    dense = next(iter(seconds.values()))
    rows = []
    for label, took in seconds.items():
        speeds = [tokens / value for value in took]
        ratios = [theirs / own for own, theirs in zip(took, dense, strict=True)]
        rows.append(
            {
                "label": label,
                "tokens_per_second": statistics.median(speeds),
                "low": min(speeds),
                "high": max(speeds),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "rounds": len(took),
            }
        )
    return rows


def _told(ways: Mapping[Work, str]) -> str:
    """Ways or dtypes in words: one name if all are the same.

    >>> _told({("prefill", 1): "eager", ("decode", 1): "grouped_mm", ("prefill", 8): "eager"})
    'prefill eager; decode grouped_mm'
    """
    if len(set(ways.values())) == 1:
        return next(iter(ways.values()))
    parts = []
    for phase in PHASES:
        found = {batch: way for (of, batch), way in ways.items() if of == phase}
        if len(set(found.values())) == 1:
            parts.append(f"{phase} {next(iter(found.values()))}")
        else:
            parts += [f"{phase} at batch {batch} {way}" for batch, way in found.items()]
    return "; ".join(parts)
