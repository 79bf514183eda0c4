"""Plain sentences on whether the MoE pays, by stated rules and from the numbers alone.

The rules, for each engine, phase, batch size and context:

- it pays when the ratio to dense was above 1 in every round, and its median is 1.05 or more;
- it does not pay when the ratio was below 1 in every round, and its median is 0.95 or less:
  it is then said to be SLOWER;
- else it makes no difference that was measured, which does not pay either, for quality was given.

What falls out alike is told in one sentence, by engine and phase.

A measurement that had less than 0.8 of a core is called unreliable before anything is said of it.

On quality: the run is held against static pruning with as many active neurons. When its loss is
surely lower on a text (95 %, paired by window), routing does not pay there, whatever its speed. On
memory: a MoE holds all of its experts; it pays where these take fewer bytes than dense.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy import stats

CLEAR = 0.05
"""A difference in speed that is worth a word."""

QUIET = 0.8
"""Processor seconds per second below which other programs have disturbed a measurement."""

PAYS, PAYS_NOT, UNKNOWN = "pays", "does not pay", "not measured"

PHASES = {"prefill": "reading a prompt", "decode": "writing"}

HEADS = {"slower": "SLOWER", "no different": "No faster", "faster": "Faster"}
"""How a sentence on speed starts, by the verdict."""

Advice = dict[str, Any]


def advice(report: Mapping[str, Any], label: str) -> list[Advice]:
    """What is to be said of the stage `label`, speed first."""
    return [
        *_speed(report.get("speed", {}), label),
        *_quality(report, label),
        *_memory(report.get("models", {}), label),
        *_routing(report.get("routing", {}).get(label, {}).get("layers", [])),
    ]


def verdict(row: Mapping[str, Any]) -> str:
    """What a row of speeds says: "faster", "slower", or "no different"."""
    if row["ratio"] >= 1 + CLEAR and row["ratio_low"] > 1:
        return "faster"
    if row["ratio"] <= 1 - CLEAR and row["ratio_high"] < 1:
        return "slower"
    return "no different"


def _speed(speed: Mapping[str, Any], label: str) -> Iterator[Advice]:
    for engine, told in speed.items():
        if (cores := told.get("cores", 1.0)) < QUIET:
            yield {
                "verdict": UNKNOWN,
                "sentence": f"The machine was busy while {engine} was measured: on average "
                f"{cores:.2f} of a core was left for it. Its speeds are not to be relied on; "
                "measure again on a quiet machine.",
                "because": {"engine": engine, "cores": cores},
            }
        rows = [row for row in told.get("rows", []) if row["label"] == label]
        for phase, said in itertools.product(PHASES, HEADS):
            alike = [row for row in rows if row["phase"] == phase and verdict(row) == said]
            if alike:
                yield _alike(engine, told, phase, said, alike)
    if not any(told.get("rows") for told in speed.values()):
        yield {
            "verdict": UNKNOWN,
            "sentence": "Speed was not measured; whether this model is faster is not known.",
            "because": {},
        }


def _alike(
    engine: str, told: Mapping[str, Any], phase: str, said: str, rows: Sequence[Mapping[str, Any]]
) -> Advice:
    """One sentence of the rows of an engine and a phase that say the same."""
    ideals = [ideal for row in rows if (ideal := _ideal(told, row)) is not None]
    low, high = min(row["ratio_low"] for row in rows), max(row["ratio_high"] for row in rows)
    machine = _threads(told["threads"]) + _dtypes(told, rows)
    ratios = _span([row["ratio"] for row in rows])
    hoped = f"; arithmetic would allow {_span(ideals)}" if ideals else ""
    return {
        "verdict": PAYS if said == "faster" else PAYS_NOT,
        "sentence": f"{HEADS[said]} in {engine} on this machine ({machine}), {PHASES[phase]} "
        f"{_sizes(rows)}: {ratios} times the dense model's tokens per second ({low:.2f} to "
        f"{high:.2f} over the rounds{hoped}).",
        "because": {
            "engine": engine,
            "phase": phase,
            "rows": [
                {key: row[key] for key in ("batch", "context", "ratio", "ratio_low", "ratio_high")}
                | {"ideal": _ideal(told, row)}
                for row in rows
            ],
        },
    }


def _dtypes(told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """What `rows` were computed in, and dense beside them if that was another dtype."""
    work = {(row["phase"], row["batch"], row["context"]) for row in rows}
    dense = [
        row
        for row in told["rows"]
        if row["label"] == "dense" and (row["phase"], row["batch"], row["context"]) in work
    ]
    own, theirs = (
        _listed(sorted({row["dtype"] for row in found if row.get("dtype")}))
        for found in (rows, dense)
    )
    if not own:  # an engine that has one type for all
        own = theirs = told["dtype"] if isinstance(told.get("dtype"), str) else ""
    return (f", {own}" if own else "") + (f", dense {theirs}" if theirs not in ("", own) else "")


def _sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Batch sizes and context lengths in words.

    >>> _sizes([{"batch": 1, "context": 128}, {"batch": 1, "context": 512}])
    'at batch 1 (128 and 512 tokens)'
    """
    contexts: dict[int, list[str]] = {}
    for row in rows:
        contexts.setdefault(row["batch"], []).append(str(row["context"]))
    told = [f"{batch} ({_listed(lengths)} tokens)" for batch, lengths in contexts.items()]
    return f"at batch {_listed(told)}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _span(values: Sequence[float]) -> str:
    """The least and the greatest; one of them where they are the same on paper."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _ideal(told: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    ideal = told.get("ideal_ratio", {}).get(row["label"], {}).get(row["phase"])
    return ideal.get(str(row["batch"])) if isinstance(ideal, Mapping) else ideal


def _quality(report: Mapping[str, Any], label: str) -> Iterator[Advice]:
    for text, rows in report.get("texts", {}).items():
        if label not in rows:
            continue
        own, static = rows[label], rows.get("static")
        cost = (
            f"On {text} it costs {own['dnll']:.3f} nats per token against dense (perplexity "
            f"{own['perplexity']:.2f} from {rows['dense']['perplexity']:.2f})"
        )
        because = {"text": text, "dnll": own["dnll"], "error": own["dnll_standard_error"]}
        if static is None:
            lacks = "it was not held against static pruning."
            yield {"verdict": UNKNOWN, "sentence": f"{cost}; {lacks}", "because": because}
            continue
        gain, error = own["gain_over_static"], own["gain_standard_error"]
        needed = needed_errors(own["windows"])
        because |= {"static_dnll": static["dnll"], "gain": gain, "gain_error": error}
        because |= {"windows": own["windows"], "needed_errors": needed}
        sure = error is not None and needed is not None and gain > needed * error
        kept = f"static pruning to as many active neurons costs {static['dnll']:.3f}"
        if sure:
            end = f"; {kept}: the experts are worth {gain:.3f}."
        elif gain > 0:
            end = f"; {kept}: {gain:.3f} more, which on so little text may be chance."
        else:
            end = f"; {kept}, NO MORE: a smaller dense model does as well, and needs no experts."
        yield {"verdict": PAYS if sure else PAYS_NOT, "sentence": cost + end, "because": because}


def needed_errors(windows: int) -> float | None:
    """Standard errors that a difference over so many windows must have, to be sure at 95 %.

    The quantile of Student's t, which with two windows is 12.7 and with many 2.0.
    """
    return float(stats.t.ppf(0.975, windows - 1)) if windows > 1 else None


def _memory(models: Mapping[str, Any], label: str) -> Iterator[Advice]:
    own, dense = models.get(label), models.get("dense")
    if not own or not dense:
        return
    ratio = own["weight_bytes"] / dense["weight_bytes"]
    because = {"weight_bytes": own["weight_bytes"], "dense_weight_bytes": dense["weight_bytes"]}
    share = own["parameters_active"] / own["parameters_total"]
    lead = f"It holds {own['weight_bytes'] / 1e6:,.0f} MB of weights, {ratio:.2f} times dense"
    saves = ratio < 1 - CLEAR
    yield {
        "verdict": PAYS if saves else PAYS_NOT,
        "sentence": f"{lead}, of which {share:.0%} are used for a token: "
        + ("memory is saved." if saves else "NO MEMORY IS SAVED, all experts must be held."),
        "because": because,
    }


def _routing(layers: list[Mapping[str, Any]]) -> Iterator[Advice]:
    dead = {layer["layer"]: layer["dead"] for layer in layers if layer["dead"]}
    if dead:
        count = sum(dead.values())
        where = ", ".join(map(str, dead))
        yield {
            "verdict": PAYS_NOT,
            "sentence": f"{count} dead experts (below 5 % of the mean load; in layers {where}): "
            "they take memory and do next to nothing on these texts.",
            "because": {"dead": count, "layers": [*dead]},
        }
