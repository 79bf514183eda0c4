"""Tokens per second in transformers: prefill, then decoding from the cache that it left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moefy.compute_dtype import name_of
from moefy.evaluate.experts_implementation import Clock, Work, Workload, fastest, fastest_round
from moefy.evaluate.timed_rounds import PHASES, Grid, cores, speed_rows, timed

LONG = 15.0
"""Seconds of all models in all rounds. A piece of work that took longer gets no third round: it
averages over much already."""


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

    `models` are functions that open a model in a dtype. Each model runs in the one of `dtypes` that
    is fastest for it, by phase and batch size.
    """
    start, spent = time.perf_counter(), time.process_time()
    workload = Workload(ids_T, grid, clock)
    opened = {label: fastest(open_in, dtypes, workload) for label, open_in in models.items()}

    def run(label: str, work: tuple[int, int], turn: int) -> dict[tuple[str, int, int], float]:
        seconds = fastest_round(opened[label], workload, *work, turn)
        return {(phase, *work): value for phase, value in zip(PHASES, seconds, strict=True)}

    seconds = timed([*opened], grid.work, grid.rounds, run, longest=LONG, watch=watch)
    rows = speed_rows(seconds, grid.new_tokens)
    for row in rows:
        way = opened[row["label"]].best[row["phase"], row["batch"]]
        row |= {"dtype": name_of(way.dtype), "way": way.implementation}
    implementations = {
        label: {work: way.implementation for work, way in model.best.items() if way.implementation}
        for label, model in opened.items()
    }
    return {
        "implementation": {
            label: _in_words(names) for label, names in implementations.items() if names
        },
        "left_out": {label: model.left_out for label, model in opened.items() if model.left_out},
        "threads": torch.get_num_threads(),
        "cores": cores(start, spent),
        "dtype": {
            label: _in_words({work: name_of(way.dtype) for work, way in model.best.items()})
            for label, model in opened.items()
        },
        "rounds": grid.rounds,
        "new_tokens": grid.new_tokens,
        "rows": sorted(rows, key=lambda row: (row["phase"] == "decode", row["batch"])),
    }


def _in_words(names: Mapping[Work, str]) -> str:
    """Implementations or dtypes in words: one name if all are the same.

    >>> _in_words({("prefill", 1): "eager", ("decode", 1): "grouped_mm", ("prefill", 8): "eager"})
    'prefill eager; decode grouped_mm'
    """
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    parts = []
    for phase in PHASES:
        by_batch = {batch: name for (of, batch), name in names.items() if of == phase}
        if len(set(by_batch.values())) == 1:
            parts.append(f"{phase} {next(iter(by_batch.values()))}")
        else:
            parts += [f"{phase} at batch {batch} {name}" for batch, name in by_batch.items()]
    return "; ".join(parts)
