"""The fastest dtype and experts implementation of transformers for a model on this machine.

Both are tried on short stretches of text, for each phase and batch size. What is hopeless for one
sequence is not tried for more.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.compute import name_of
from moefy.errors import MoefyError
from moefy.evaluate.rounds import PHASES, Grid, stretches

IMPLEMENTATIONS: tuple[str, ...] = ("grouped_mm", "eager", "batched_mm")
"""The experts implementations of transformers; the fastest one is used for each piece of work."""

TRIAL, MOST_TRIED, LEAST_TRIED = 64, 512, 16
"""Tokens of a trial: per sequence, in all sequences of a batch, and per sequence at least."""

HOPELESS = 2.0
"""An implementation or a dtype that is this many times slower than another at one sequence is not
tried at more."""

CLEARLY = 1.05
"""A dtype replaces the first one if it is this many times faster. Below that, a second dtype would
double the time of the measurement for nothing."""

Clock = Callable[[], float]
Work = tuple[str, int]
"""A phase and a batch size."""


@dataclass(frozen=True)
class Workload:
    """The text, the grid and the clock of a measurement."""

    ids_T: Tensor
    grid: Grid
    clock: Clock


@dataclass(frozen=True)
class Trial:
    """A model in one dtype: its fastest implementation for each piece of work."""

    best: dict[Work, str | None]
    seconds: dict[Work, float]
    """Lacks the work that was not tried, because the dtype is hopeless there."""
    left_out: dict[str, str]
    """Why an implementation cannot compute this model: each one restricts the widths (grouped_mm
    needs rows of multiples of 16 bytes)."""


@dataclass(frozen=True)
class Fastest:
    """A model in every dtype that is the fastest one for some piece of work."""

    models: dict[torch.dtype, tuple[Any, Trial]]
    dtypes: dict[Work, torch.dtype]
    left_out: dict[str, str]

    def implementation(self, work: Work) -> str | None:
        """The experts implementation for a piece of work."""
        return self.models[self.dtypes[work]][1].best.get(work)


def fastest(
    open_in: Callable[[torch.dtype], Any], dtypes: Sequence[torch.dtype], workload: Workload
) -> Fastest:
    """A model in the fastest of `dtypes` for each piece of work; the other dtypes are released.

    Raises:
        MoefyError: code 6, when the model can be computed in none.
    """
    work = list(itertools.product(PHASES, workload.grid.batches))
    trials: dict[torch.dtype, tuple[Any, Trial]] = {}
    left_out: dict[str, str] = {}
    least: dict[Work, float] = {}
    for dtype in dtypes:
        model = open_in(dtype)
        if len(dtypes) == 1 and not _has_implementations(model):
            return Fastest({dtype: (model, Trial({}, {}, {}))}, dict.fromkeys(work, dtype), {})
        try:
            trial = best_implementations(model, workload, least)
        except MoefyError as error:
            if dtype == dtypes[-1] and not trials:
                raise
            left_out[name_of(dtype)] = str(error)
            continue
        trials[dtype] = (model, trial)
        left_out |= {f"{name} in {name_of(dtype)}": why for name, why in trial.left_out.items()}
        for one, seconds in trial.seconds.items():
            least[one] = min(seconds, least.get(one, seconds))
    best = {one: _clearly_best(trials, one) for one in work}
    return Fastest({dtype: trials[dtype] for dtype in set(best.values())}, best, left_out)


def _clearly_best(trials: Mapping[torch.dtype, tuple[Any, Trial]], work: Work) -> torch.dtype:
    """The fastest dtype for a piece of work; the first one, unless another is clearly faster."""
    seconds = {dtype: trial.seconds.get(work, math.inf) for dtype, (_, trial) in trials.items()}
    first, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[first] > CLEARLY * seconds[best] else first


def fastest_round(
    model: Fastest, workload: Workload, batch: int, context: int, turn: int
) -> tuple[float, float]:
    """`one_round` with each phase in its fastest dtype."""

    def seconds(phase: str, workload: Workload) -> tuple[float, float]:
        opened, trial = model.models[model.dtypes[phase, batch]]
        return one_round(opened, workload, batch, context, turn, trial.best)

    prefill, decode = seconds("decode", workload)
    if model.dtypes["prefill", batch] != model.dtypes["decode", batch]:
        no_steps = dataclasses.replace(workload.grid, new_tokens=0)
        prefill, _ = seconds("prefill", dataclasses.replace(workload, grid=no_steps))
    return prefill, decode


def best_implementations(
    model: Any, workload: Workload, least: Mapping[Work, float] | None = None
) -> Trial:
    """The fastest experts implementation by phase and batch size; None for a dense model.

    `least` holds the seconds of other dtypes: what is hopeless against them is not tried on.

    Raises:
        MoefyError: code 6, when no implementation can compute this model.
    """
    least = least or {}
    known: list[str | None] = [*IMPLEMENTATIONS] if _has_implementations(model) else [None]
    hopeful = dict.fromkeys(PHASES, known)
    trial, batches = Trial({}, {}, {}), workload.grid.batches
    for batch in batches:
        for phase, seconds in _try(model, workload, batch, hopeful, trial).items():
            work = (phase, batch)
            if not hopeful[phase]:
                trial.best[work] = trial.best[phase, batches[0]]
                continue
            if not seconds:
                reasons = "; ".join(f"{name}: {why}" for name, why in trial.left_out.items())
                raise MoefyError(
                    f"no experts implementation can compute this model ({reasons})", code=6
                )
            best = min(seconds, key=seconds.__getitem__)
            trial.best[work], trial.seconds[work] = best, seconds[best]
            most = HOPELESS * min(seconds[best], least.get(work, math.inf))
            hopeful[phase] = [name for name in seconds if seconds[name] <= most]
    return trial


def _try(
    model: Any,
    workload: Workload,
    batch: int,
    hopeful: Mapping[str, Sequence[str | None]],
    trial: Trial,
) -> dict[str, dict[str | None, float]]:
    """Seconds of every hopeful implementation at one batch size, by phase.

    Those that fail go into `trial.left_out`.
    """
    seconds: dict[str, dict[str | None, float]] = {phase: {} for phase in PHASES}
    context = min(TRIAL, max(LEAST_TRIED, MOST_TRIED // batch))
    usual = trial.best.get(("prefill", workload.grid.batches[0]))
    short = Grid((), 1, min(workload.grid.new_tokens, 4))
    workload = dataclasses.replace(workload, grid=short)
    for name in dict.fromkeys([*hopeful["prefill"], *hopeful["decode"]]):
        # One that is only tried for decoding prefills by the best one at the smallest batch.
        prefill = name if name in hopeful["prefill"] else usual
        names = {("prefill", batch): prefill, ("decode", batch): name}
        try:
            if not trial.best:  # the first run is slower whatever the implementation
                one_round(model, workload, batch, context, 0, names)
            values = one_round(model, workload, batch, context, 1, names)
        except Exception as error:  # a library's own, of a kind that it does not name
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            trial.left_out[name or "transformers"] = reason
            continue
        for phase, value in zip(PHASES, values, strict=True):
            if name in hopeful[phase]:
                seconds[phase][name] = value
    return seconds


def _has_implementations(model: Any) -> bool:
    """Whether transformers has several experts implementations for this model."""
    return getattr(model, "_can_set_experts_implementation", bool)()


def one_round(
    model: Any,
    workload: Workload,
    batch: int,
    context: int,
    turn: int,
    names: Mapping[Work, str | None],
) -> tuple[float, float]:
    """Seconds to prefill `batch` stretches of `context` tokens, and to decode the next ones.

    Decoding follows the text, so that all models decode the same tokens. `names` are the experts
    implementations.
    """
    ids_BT = stretches(workload.ids_T, batch, context + workload.grid.new_tokens, turn)
    clock = workload.clock
    with torch.inference_mode():
        _use(model, names.get(("prefill", batch)))
        start = clock()
        cache = model(ids_BT[:, :context], use_cache=True, logits_to_keep=1).cache
        prefill = clock() - start
        _use(model, names.get(("decode", batch)))
        start = clock()
        for step in range(context, ids_BT.shape[1]):
            model(ids_BT[:, step : step + 1], cache=cache, use_cache=True)
        return prefill, clock() - start


def _use(model: Any, name: str | None) -> None:
    if name is not None:
        model.set_experts_implementation(name)
