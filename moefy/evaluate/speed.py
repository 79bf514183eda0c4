"""Tokens per second in transformers: dense against MoE, in turns, with what arithmetic allows.

Every round runs every model on the same real text, prefill first and then decoding from the cache
that it left, so that a machine that slows down slows all. The ratio to dense is taken within the
round; medians over rounds are told, with the lowest and the highest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError

IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
"""How transformers may compute experts; the fastest one is used for each piece of work."""

TRIAL = 64
"""Tokens in a sequence by which implementations are tried."""

LONG = 15.0
"""Seconds in all rounds, of all models: a piece of work that took as long gets no third round, for
it is an average over much in itself."""

HOPELESS = 2.0
"""An implementation so many times slower than another at one sequence is not tried at more."""


@dataclass(frozen=True)
class Grid:
    """What is measured: batch sizes, each with some context lengths."""

    work: tuple[tuple[int, int], ...]
    """Pairs of batch size and context length."""
    rounds: int = 3
    """At most; see `LONG`."""
    new_tokens: int = 8


Row = dict[str, Any]
Clock = Callable[[], float]


def measure(
    models: Mapping[str, Any],
    ids_T: Tensor,
    grid: Grid,
    *,
    clock: Clock = time.perf_counter,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Speed of `models`, the first of which is dense, on stretches of the text `ids_T`."""
    start, spent = time.perf_counter(), time.process_time()
    ways: dict[str, dict[tuple[str, int], str | None]] = {}
    left_out: dict[str, dict[str, str]] = {}
    for label, model in models.items():
        ways[label], left_out[label] = implementations(model, ids_T, grid, clock)
    seconds: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    total = dict.fromkeys(grid.work, 0.0)
    steps = schedule(grid.work, grid.rounds)
    for done, (turn, (batch, context)) in enumerate(steps, 1):
        if turn > 2 and total[batch, context] > LONG:
            continue
        for label, model in models.items():
            took = one_round(model, ids_T, batch, context, grid, turn, ways[label], clock)
            total[batch, context] += sum(took) if turn else 0.0
            for phase, value in zip(("prefill", "decode"), took, strict=True):
                if turn:
                    rows = seconds.setdefault((phase, batch, context), {})
                    rows.setdefault(label, []).append(value)
        watch(done, len(steps))
    rows = []
    for (phase, batch, context), took in seconds.items():
        tokens = batch * (context if phase == "prefill" else grid.new_tokens)
        for row in speed_rows(took, tokens):
            way = ways[row["label"]].get((phase, batch))
            rows.append({"phase": phase, "batch": batch, "context": context, **row, "way": way})
    return {
        "implementation": {
            label: _told(found) for label, found in ways.items() if any(found.values())
        },
        "left_out": {label: reasons for label, reasons in left_out.items() if reasons},
        "threads": torch.get_num_threads(),
        "cores": cores(start, spent),
        "dtype": {
            label: str(model.dtype).removeprefix("torch.") for label, model in models.items()
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


def implementations(
    model: Any, ids_T: Tensor, grid: Grid, clock: Clock
) -> tuple[dict[tuple[str, int], str | None], dict[str, str]]:
    """The fastest way to compute the experts, by phase and batch size; none for other models.

    With it, why ways were left out that cannot compute this model: each has its own demands on the
    widths (grouped_mm takes rows of multiples of 16 bytes).
    """
    if not getattr(model, "_can_set_experts_implementation", bool)():
        return {}, {}
    best: dict[tuple[str, int], str | None] = {}
    left_out: dict[str, str] = {}
    hopeful: dict[str, list[str]] = {
        "prefill": list(IMPLEMENTATIONS),
        "decode": list(IMPLEMENTATIONS),
    }
    trial = Grid((), 1, min(grid.new_tokens, 4))
    for batch in sorted({batch for batch, _ in grid.work}):
        took: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}}
        for way in dict.fromkeys(hopeful["prefill"] + hopeful["decode"]):
            # One that is only tried for decoding reads by the way that was best before.
            read = way if way in hopeful["prefill"] else best[("prefill", 1)]
            ways = {("prefill", batch): read, ("decode", batch): way}
            try:
                if not best:  # the first time is slower whatever the way
                    one_round(model, ids_T, batch, TRIAL, trial, 0, ways, clock)
                values = one_round(model, ids_T, batch, TRIAL, trial, 1, ways, clock)
            except Exception as error:  # a library's own, of a kind that it does not name
                left_out[way] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                continue
            for phase, seconds in zip(took, values, strict=True):
                if way in hopeful[phase]:
                    took[phase][way] = seconds
        if not all(took.values()):
            reasons = "; ".join(f"{way}: {reason}" for way, reason in left_out.items())
            raise MoefyError(f"no way to compute the experts is left ({reasons})", code=6)
        for phase, found in took.items():
            least = min(found.values())
            best[phase, batch] = min(found, key=found.__getitem__)
            hopeful[phase] = [way for way in found if found[way] <= HOPELESS * least]
    return best, left_out


def use(model: Any, way: str | None) -> None:
    """Compute experts in this way from now on."""
    if way is not None:
        model.set_experts_implementation(way)


def _told(ways: Mapping[tuple[str, int], str | None]) -> str:
    """The ways in words: one name if all are the same.

    >>> _told({("prefill", 1): "eager", ("decode", 1): "grouped_mm", ("prefill", 8): "eager"})
    'prefill eager; decode grouped_mm'
    """
    if len(set(ways.values())) == 1:
        return str(next(iter(ways.values())))
    parts = []
    for phase in ("prefill", "decode"):
        found = {batch: way for (of, batch), way in ways.items() if of == phase}
        if len(set(found.values())) == 1:
            parts.append(f"{phase} {next(iter(found.values()))}")
        else:
            parts += [f"{phase} at batch {batch} {way}" for batch, way in found.items()]
    return "; ".join(parts)


def ideals(
    sizes: Mapping[str, Mapping[str, Any]], batches: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """What arithmetic and memory traffic would allow each label, relative to dense.

    Prefill is bound by operations: FLOPs of dense over own. Decoding is bound by the weights that
    are read in a step: all that are always on, and of E experts with K per token, a batch of B
    reads 1 - (1 - K/E)^B on average, if tokens choose evenly and apart from each other.
    """
    dense = next(iter(sizes.values()))
    found = {}
    for label, own in sizes.items():
        decode = {
            str(batch): _read_bytes(dense, batch) / _read_bytes(own, batch) for batch in batches
        }
        prefill = dense["flops_per_token"] / own["flops_per_token"]
        found[label] = {"prefill": prefill, "decode": decode}
    return found


def _read_bytes(sizes: Mapping[str, Any], batch: int) -> float:
    """Bytes of weights that one decoding step of a batch reads."""
    fixed = sizes["weight_bytes"] - sizes["embedding_bytes"]
    if not sizes["experts"]:
        return fixed
    count, chosen = sizes["experts"]
    idle = sizes["weight_bytes"] - sizes["weight_bytes_active"]
    routed = idle * count / (count - chosen) if count > chosen else 0
    return fixed - routed * (1 - chosen / count) ** batch
