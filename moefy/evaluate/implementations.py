"""The fastest way in which transformers computes a model here: its dtype, and that of the experts.

Both are tried on short stretches of text, for each phase and batch size; what is hopeless for one
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

PHASES: tuple[str, ...] = ("prefill", "decode")

IMPLEMENTATIONS: tuple[str, ...] = ("grouped_mm", "eager", "batched_mm")
"""How transformers may compute experts; the fastest one is used for each piece of work."""

TRIAL, MOST_TRIED, LEAST_TRIED = 64, 512, 16
"""Tokens in a sequence by which implementations are tried, and in all sequences of a batch, each of
which has the least all the same."""

HOPELESS = 2.0
"""An implementation or a dtype so many times slower than another at one sequence is not tried at
more."""

CLEARLY = 1.05
"""A dtype so many times faster than the first one is taken in its place. For less, a model would be
measured in two dtypes, which takes twice as long and tells little."""

Clock = Callable[[], float]
Work = tuple[str, int]
"""A phase and a batch size."""


@dataclass(frozen=True)
class Grid:
    """What is measured: batch sizes, each with some context lengths."""

    work: tuple[tuple[int, int], ...]
    """Pairs of batch size and context length."""
    rounds: int = 3
    """At most; see `LONG`."""
    new_tokens: int = 8


GRIDS = {
    "quick": Grid(((1, 128),), rounds=3),
    "usual": Grid(((1, 128), (1, 512), (8, 128), (32, 128)), rounds=3),
    "full": Grid(
        ((1, 128), (1, 512), (1, 1536), (8, 128), (8, 512), (32, 128), (32, 512)),
        rounds=5,
        new_tokens=16,
    ),
}
"""By the effort of a report."""


@dataclass(frozen=True)
class Trial:
    """How a model computes in one dtype: the fastest way for each piece of work."""

    ways: dict[Work, str | None]
    seconds: dict[Work, float]
    """Lacks what was not tried because the dtype is hopeless there."""
    left_out: dict[str, str]
    """Why ways were left out that cannot compute this model: each has its own demands on the widths
    (grouped_mm takes rows of multiples of 16 bytes)."""


@dataclass(frozen=True)
class Fastest:
    """A model in every dtype that is the fastest one for some piece of work."""

    models: dict[torch.dtype, tuple[Any, Trial]]
    dtypes: dict[Work, torch.dtype]
    left_out: dict[str, str]

    def way(self, work: Work) -> str | None:
        """How experts are computed there."""
        return self.models[self.dtypes[work]][1].ways.get(work)


def fastest(
    open_in: Callable[[torch.dtype], Any],
    dtypes: Sequence[torch.dtype],
    ids_T: Tensor,
    grid: Grid,
    clock: Clock,
) -> Fastest:
    """A model in the fastest of `dtypes` for each piece of work; the other dtypes are let go.

    Raises:
        MoefyError: code 6, when it can be computed in none.
    """
    work = list(itertools.product(PHASES, sorted({batch for batch, _ in grid.work})))
    tried: dict[torch.dtype, tuple[Any, Trial]] = {}
    left_out: dict[str, str] = {}
    least: dict[Work, float] = {}
    for dtype in dtypes:
        model = open_in(dtype)
        if len(dtypes) == 1 and not _has_ways(model):
            return Fastest({dtype: (model, Trial({}, {}, {}))}, dict.fromkeys(work, dtype), {})
        try:
            trial = implementations(model, ids_T, grid, clock, least)
        except MoefyError as error:
            if dtype == dtypes[-1] and not tried:
                raise
            left_out[name_of(dtype)] = str(error)
            continue
        tried[dtype] = (model, trial)
        left_out |= {f"{way} in {name_of(dtype)}": why for way, why in trial.left_out.items()}
        for one, seconds in trial.seconds.items():
            least[one] = min(seconds, least.get(one, seconds))
    best = {one: _clearly_best(tried, one) for one in work}
    return Fastest({dtype: tried[dtype] for dtype in set(best.values())}, best, left_out)


def _clearly_best(tried: Mapping[torch.dtype, tuple[Any, Trial]], one: Work) -> torch.dtype:
    """The fastest dtype for a piece of work; the first one, where no other is clearly faster."""
    took = {dtype: trial.seconds.get(one, math.inf) for dtype, (_, trial) in tried.items()}
    first, best = next(iter(took)), min(took, key=took.__getitem__)
    return best if took[first] > CLEARLY * took[best] else first


def fastest_round(
    model: Fastest, ids_T: Tensor, batch: int, context: int, grid: Grid, turn: int, clock: Clock
) -> tuple[float, float]:
    """`one_round` in the fastest dtypes; if they differ, each phase is taken from its own's."""

    def took(phase: str, grid: Grid) -> tuple[float, float]:
        opened, trial = model.models[model.dtypes[phase, batch]]
        return one_round(opened, ids_T, batch, context, grid, turn, trial.ways, clock)

    prefill, decode = took("decode", grid)
    if model.dtypes["prefill", batch] != model.dtypes["decode", batch]:
        prefill, _ = took("prefill", dataclasses.replace(grid, new_tokens=0))
    return prefill, decode


def implementations(
    model: Any, ids_T: Tensor, grid: Grid, clock: Clock, least: Mapping[Work, float] | None = None
) -> Trial:
    """The fastest way to compute the experts, by phase and batch size; None for a dense model.

    `least` are the seconds of other dtypes: a way that is hopeless against them is given up, too.

    Raises:
        MoefyError: code 6, when no way can compute this model.
    """
    least = least or {}
    known: tuple[str | None, ...] = IMPLEMENTATIONS if _has_ways(model) else (None,)
    result = Trial({}, {}, {})
    hopeful = {phase: list(known) for phase in PHASES}
    trial = Grid((), 1, min(grid.new_tokens, 4))
    batches = sorted({batch for batch, _ in grid.work})
    for batch in batches:
        took: dict[str, dict[str | None, float]] = {phase: {} for phase in PHASES}
        context = min(TRIAL, max(LEAST_TRIED, MOST_TRIED // batch))
        for way in dict.fromkeys(hopeful["prefill"] + hopeful["decode"]):
            # One that is only tried for decoding reads by the way that was best before.
            read = way if way in hopeful["prefill"] else result.ways["prefill", batches[0]]
            ways = {("prefill", batch): read, ("decode", batch): way}
            try:
                if not result.ways:  # the first time is slower whatever the way
                    one_round(model, ids_T, batch, context, trial, 0, ways, clock)
                values = one_round(model, ids_T, batch, context, trial, 1, ways, clock)
            except Exception as error:  # a library's own, of a kind that it does not name
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                result.left_out[way or "transformers"] = reason
                continue
            for phase, seconds in zip(PHASES, values, strict=True):
                if way in hopeful[phase]:
                    took[phase][way] = seconds
        for phase, seconds in took.items():
            if not hopeful[phase]:
                result.ways[phase, batch] = result.ways[phase, batches[0]]
                continue
            if not seconds:
                reasons = "; ".join(f"{way}: {why}" for way, why in result.left_out.items())
                raise MoefyError(f"no way to compute this model is left ({reasons})", code=6)
            best = min(seconds, key=seconds.__getitem__)
            result.ways[phase, batch], result.seconds[phase, batch] = best, seconds[best]
            most = HOPELESS * min(seconds[best], least.get((phase, batch), math.inf))
            hopeful[phase] = [way for way in seconds if seconds[way] <= most]
    return result


def _has_ways(model: Any) -> bool:
    """Whether transformers may compute the experts of this model in several ways."""
    return getattr(model, "_can_set_experts_implementation", bool)()


def use(model: Any, way: str | None) -> None:
    """Compute experts in this way from now on."""
    if way is not None:
        model.set_experts_implementation(way)


def one_round(
    model: Any,
    ids_T: Tensor,
    batch: int,
    context: int,
    grid: Grid,
    turn: int,
    ways: Mapping[tuple[str, int], str | None],
    clock: Clock,
) -> tuple[float, float]:
    """Seconds to read `batch` stretches of `context` tokens, and to take `new_tokens` steps more.

    The steps read on in the text: so all models decode the same tokens.
    """
    ids_BT = stretches(ids_T, batch, context + grid.new_tokens, turn)
    with torch.inference_mode():
        use(model, ways.get(("prefill", batch)))
        start = clock()
        cache = model(ids_BT[:, :context], use_cache=True, logits_to_keep=1).cache
        prefill = clock() - start
        use(model, ways.get(("decode", batch)))
        start = clock()
        for step in range(context, ids_BT.shape[1]):
            model(ids_BT[:, step : step + 1], cache=cache, use_cache=True)
        return prefill, clock() - start


def stretches(ids_T: Tensor, batch: int, length: int, turn: int) -> Tensor:
    """`batch` stretches of the text, spread over it evenly and elsewhere in every turn, (B, T)."""
    room = max(len(ids_T), 1)
    starts = [(turn * 101 + number * room // batch) % room for number in range(batch)]
    around_T = ids_T.repeat(1 + (length + room - 1) // room)
    return torch.stack([around_T[at : at + length] for at in starts])
