"""Tokens per second in transformers: prefill, then decoding from the cache that it left.

Each model runs in the dtype and with the experts implementation that are fastest on this machine.
Both are tried on short stretches of text, for each phase and batch size. What is hopeless for one
sequence is not tried for more. On a GPU, decoding by CUDA graphs is tried as well.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moefy.compute_dtype import name_of
from moefy.errors import MoefyError
from moefy.evaluate.cuda_graphs import Graphed
from moefy.evaluate.timed_rounds import PHASES, Grid, cores, speed_rows, stretches, timed

LONG = 15.0
"""Seconds of all models in all rounds. A piece of work that took longer gets no third round: it
averages over much already."""

IMPLEMENTATIONS: tuple[str, ...] = ("grouped_mm", "eager", "batched_mm")
"""The experts implementations of transformers; the fastest one is used for each piece of work."""

LEAST_TRIED = 16
"""Tokens of a trial per sequence, at least."""

HOPELESS = 2.0
"""An implementation or a dtype that is this many times slower than another at one sequence is not
tried at more."""

CLEARLY = 1.05
"""A dtype replaces the first one if it is this many times faster. Below that, a second dtype would
double the time of the measurement for nothing."""

GRAPHS = "CUDA graphs"

Clock = Callable[[], float]
Work = tuple[str, int]
"""A phase and a batch size."""


@dataclass(frozen=True)
class Workload:
    """The text, the grid and the clock of a measurement."""

    ids_T: Tensor
    grid: Grid
    clock: Clock


class Way(NamedTuple):
    """One way to compute a model."""

    dtype: torch.dtype
    implementation: str | None
    """Of the experts; None for a dense model."""
    graphs: bool = False
    """Whether CUDA graphs start the kernels of a decoding step."""

    @property
    def name(self) -> str:
        """What the dtype leaves open; empty for a dense model as it is."""
        return " with ".join(filter(None, (self.implementation, GRAPHS * self.graphs)))

    @property
    def opened(self) -> tuple[torch.dtype, bool]:
        """The key of the model that computes in this way."""
        return self.dtype, self.graphs

    def __str__(self) -> str:
        dtype = name_of(self.dtype)
        return f"{self.name} in {dtype}" if self.name else dtype


@dataclass(frozen=True)
class Fastest:
    """A model in every dtype that is the fastest one for some piece of work."""

    models: dict[tuple[torch.dtype, bool], Any]
    """By `Way.opened`."""
    best: dict[Work, Way]
    prefill: dict[torch.dtype, str | None]
    """The fastest implementation for prefill in each dtype, at the smallest batch."""
    left_out: dict[str, str]
    """Why a way cannot compute this model: each implementation restricts the widths (grouped_mm
    needs rows of multiples of 16 bytes)."""


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

    Raises:
        MoefyError: code 5, where memory holds nothing of the grid, 6, as `fastest`.
    """
    start, spent = time.perf_counter(), time.process_time()
    workload = Workload(ids_T, grid, clock)
    opened = {label: fastest(open_in, dtypes, workload) for label, open_in in models.items()}
    work = [pair for pair in grid.work if all(_fits(m, workload, *pair) for m in opened.values())]
    if not work:
        raise MoefyError("memory holds none of the batches; take a smaller model", code=5)

    def run(label: str, work: tuple[int, int], turn: int) -> dict[tuple[str, int, int], float]:
        seconds = fastest_round(opened[label], workload, *work, turn)
        return {(phase, *work): value for phase, value in zip(PHASES, seconds, strict=True)}

    seconds = timed([*opened], work, grid.rounds, run, longest=LONG, watch=watch)
    rows = speed_rows(seconds, grid.new_tokens)
    for row in rows:
        way = opened[row["label"]].best[row["phase"], row["batch"]]
        row |= {"dtype": name_of(way.dtype), "way": way.name or None}
    ways = {
        label: {work: way.name for work, way in model.best.items() if way.name}
        for label, model in opened.items()
    }
    return {
        "implementation": {label: _in_words(names) for label, names in ways.items() if names},
        "too_large": [pair for pair in grid.work if pair not in work],
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


def fastest(
    open_in: Callable[[torch.dtype], Any], dtypes: Sequence[torch.dtype], workload: Workload
) -> Fastest:
    """A model in the fastest of `dtypes` for each piece of work; the other dtypes are released.

    Raises:
        MoefyError: code 6, when the model can be computed in no way.
    """
    grid, batches = workload.grid, workload.grid.batches
    models: dict[Any, Any] = {(dtype, False): open_in(dtype) for dtype in dtypes}
    ways = [Way(dtype, name) for (dtype, _), model in models.items() for name in _known(model)]
    graphed = [way._replace(graphs=True) for way in ways if grid.graphs and way.name != "eager"]
    models |= {way.opened: Graphed(models[way.dtype, False], grid.new_tokens) for way in graphed}
    if len(ways) == 1 and not graphed:
        best = dict.fromkeys(itertools.product(PHASES, batches), ways[0])
        return Fastest(models, best, dict.fromkeys(dtypes), {})
    result = Fastest(models, {}, {}, {})
    hopeful = {"prefill": ways, "decode": [*ways, *graphed]}
    for batch in batches:
        hopeful = {
            phase: [way for way in some if not way.graphs or batch <= grid.graphs]
            for phase, some in hopeful.items()
        }
        tried = _try(result, workload, batch, hopeful)
        if tried is None:  # nor does memory hold larger batches
            break
        for phase, seconds in tried.items():
            if not seconds:
                reasons = "; ".join(f"{way}: {why}" for way, why in result.left_out.items())
                raise MoefyError(f"nothing can compute this model ({reasons})", code=6)
            result.best[phase, batch] = _clearly_best(seconds, dtypes)
            least = {way.graphs: min(_alike(seconds, way)) for way in seconds}
            hopeful[phase] = [
                way for way, value in seconds.items() if value <= HOPELESS * least[way.graphs]
            ]
            if phase == "prefill" and not result.prefill:
                slowest_first = sorted(seconds, key=seconds.__getitem__, reverse=True)
                result.prefill.update((way.dtype, way.implementation) for way in slowest_first)
    used = {way.opened for way in result.best.values()}
    return dataclasses.replace(result, models={key: models[key] for key in used})


def _alike(seconds: Mapping[Way, float], way: Way) -> list[float]:
    """Seconds of all ways with graphs, or of all without, as `way` is: large batches have none."""
    return [value for other, value in seconds.items() if other.graphs == way.graphs]


def _fits(model: Fastest, workload: Workload, batch: int, context: int) -> bool:
    """Whether memory holds a model's work at a batch size and a context length."""
    if ("decode", batch) not in model.best:
        return False
    try:
        if workload.grid.warm:
            fastest_round(model, workload, batch, context, 0)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def _known(model: Any) -> tuple[str | None, ...]:
    """The experts implementations that transformers has for this model."""
    return IMPLEMENTATIONS if getattr(model, "_can_set_experts_implementation", bool)() else (None,)


def _try(
    model: Fastest, workload: Workload, batch: int, hopeful: Mapping[str, Sequence[Way]]
) -> dict[str, dict[Way, float]] | None:
    """Seconds of every hopeful way at one batch size, by phase; failures go into `left_out`.

    None, where memory holds this batch in no way.
    """
    grid, full = workload.grid, False
    seconds: dict[str, dict[Way, float]] = {phase: {} for phase in PHASES}
    context = min(grid.trial, max(LEAST_TRIED, grid.most_tried // batch))
    workload = dataclasses.replace(workload, grid=Grid((), 1, min(grid.new_tokens, 4)))
    for way in dict.fromkeys([*hopeful["prefill"], *hopeful["decode"]]):
        opened, name = model.models[way.opened], way.implementation
        # A way that is only tried for decoding prefills by the fastest one of its dtype.
        prefill = name if way in hopeful["prefill"] else model.prefill.get(way.dtype, name)
        try:
            if grid.warm or not model.best:  # the first run of an implementation is slower
                one_round(opened, workload, (batch, context, 0), prefill, name)
            values = one_round(opened, workload, (batch, context, 1), prefill, name)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            full = True
            continue
        except Exception as error:  # a library's own, of a kind that it does not name
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            model.left_out[str(way)] = reason
            continue
        for phase, value in zip(PHASES, values, strict=True):
            if way in hopeful[phase]:
                seconds[phase][way] = value
    return None if full and not all(seconds.values()) else seconds


def _clearly_best(seconds: Mapping[Way, float], dtypes: Sequence[torch.dtype]) -> Way:
    """The fastest way in the first dtype, unless one in another dtype is clearly faster."""
    best = min(seconds, key=seconds.__getitem__)
    first = min((way.dtype for way in seconds), key=dtypes.index)
    usual = min((way for way in seconds if way.dtype == first), key=seconds.__getitem__)
    return best if seconds[usual] > CLEARLY * seconds[best] else usual


def fastest_round(
    model: Fastest, workload: Workload, batch: int, context: int, turn: int
) -> tuple[float, float]:
    """`one_round` with each phase in its fastest way."""
    first, then = model.best["prefill", batch], model.best["decode", batch]
    run, opened = (batch, context, turn), model.models[then.opened]
    if first.opened == then.opened:
        return one_round(opened, workload, run, first.implementation, then.implementation)
    _, decode = one_round(opened, workload, run, model.prefill[then.dtype], then.implementation)
    no_steps = dataclasses.replace(workload.grid, new_tokens=0)
    workload = dataclasses.replace(workload, grid=no_steps)
    prefill, _ = one_round(model.models[first.opened], workload, run, first.implementation, None)
    return prefill, decode


def one_round(
    model: Any,
    workload: Workload,
    run: tuple[int, int, int],
    prefill: str | None,
    decode: str | None,
) -> tuple[float, float]:
    """Seconds to prefill `batch` stretches of `context` tokens, and to decode the next ones.

    `run` is the batch size, the context length and the round; `prefill` and `decode` are the
    experts implementations. Decoding follows the text: all models decode the same tokens.
    """
    batch, context, turn = run
    ids_BT = stretches(workload.ids_T, batch, context + workload.grid.new_tokens, turn)
    clock = workload.clock
    with torch.inference_mode():
        _use(model, prefill)
        start = clock()
        cache = model(ids_BT[:, :context], use_cache=True, logits_to_keep=1).cache
        prefilled = clock() - start
        _use(model, decode)
        start = clock()
        for step in range(context, ids_BT.shape[1]):
            model(ids_BT[:, step : step + 1], cache=cache, use_cache=True)
        return prefilled, clock() - start


def _use(model: Any, implementation: str | None) -> None:
    if implementation is not None:
        model.set_experts_implementation(implementation)
