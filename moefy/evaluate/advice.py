"""Plain sentences on whether the MoE pays, by fixed rules and from the numbers alone.

Speed, for each engine, phase, batch size and context:

- it pays when the ratio to dense was above 1 in every round, and its median is 1.05 or more;
- it is SLOWER when the ratio was below 1 in every round, and its median is 0.95 or less;
- else there is no measured difference, which does not pay either, because quality was lost.

Rows with the same verdict share a sentence, by engine and phase. A measurement that had less than
0.8 of a core is called unreliable first.

Quality: the run is compared with static pruning to as many active neurons. Routing pays on a text
when its loss is surely lower there (95 %, paired by window). Copies pay when it is surely below the
dense model's. Memory: a MoE holds all of its experts, so it pays when these take fewer bytes than
dense.

Behaviour: it loops or breaks JSON more often than dense, or stops less often, when the interval of
the difference excludes 0 (95 %, paired by prompt). A model without a chat template need not stop.

Lost experts: a run depends on those without which it loses more than 0.1 nats per token.

Rivals: by the rule of `frontier`, on the mean KL over the texts. At batch 1 bytes read per token
decide, for prefill and large batches operations do. It pays where the run is a best point, as it is
or in another type, and a rival that costs as little was measured, so that there was a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moefy.evaluate import behaviour, critical_experts, frontier
from moefy.evaluate.metrics import needed_errors
from moefy.report.format import band, flattered, large

CLEAR = 0.05
"""The smallest difference in speed that counts."""

QUIET = 0.8
"""Processor seconds per second; below this, other programs have disturbed the measurement."""

PAYS, PAYS_NOT, UNKNOWN = "pays", "does not pay", "not measured"

PHASES = {"prefill": "reading a prompt", "decode": "writing"}

HEADS = {"slower": "SLOWER", "no different": "No faster", "faster": "Faster"}
"""The start of a sentence on speed, by the verdict."""

Advice = dict[str, Any]


def advice(report: Mapping[str, Any], label: str) -> list[Advice]:
    """The advice on the candidate `label`, speed first."""
    return [
        *_speed(report.get("speed", {}), label),
        *_quality(report, label),
        *_rivals(report, label),
        *_memory(report.get("models", {}), label),
        *(
            _advice(PAYS_NOT, sentence, **because)
            for sentence, because in behaviour.worse(report.get("behaviour", {}), label)
        ),
        *(
            _advice(PAYS_NOT if critical else PAYS, sentence, worst=worst)
            for sentence, critical, worst in critical_experts.advice(report, label)
        ),
        *_routing(report.get("routing", {}).get(label, {}).get("layers", [])),
    ]


def _advice(verdict: str, sentence: str, **because: Any) -> Advice:
    return {"verdict": verdict, "sentence": sentence, "because": because}


def verdict(row: Mapping[str, Any]) -> str:
    """Verdict on a row of speeds: "faster", "slower", or "no different"."""
    if row["ratio"] >= 1 + CLEAR and row["ratio_low"] > 1:
        return "faster"
    if row["ratio"] <= 1 - CLEAR and row["ratio_high"] < 1:
        return "slower"
    return "no different"


def _speed(speed: Mapping[str, Any], label: str) -> Iterator[Advice]:
    for engine, result in speed.items():
        if (cores := result.get("cores", 1.0)) < QUIET:
            yield _advice(
                UNKNOWN,
                f"The machine was busy while {engine} was measured, which had only {cores:.2f} of "
                "a core on average. Its speeds are unreliable; measure again on a quiet machine.",
                engine=engine,
                cores=cores,
            )
        rows = [row for row in result.get("rows", []) if row["label"] == label]
        for phase, outcome in itertools.product(PHASES, HEADS):
            alike = [row for row in rows if row["phase"] == phase and verdict(row) == outcome]
            if alike:
                yield _alike(engine, result, phase, outcome, alike)
    if not any(result.get("rows") for result in speed.values()):
        unknown = "Speed was not measured, so it is unknown whether this model is faster."
        yield _advice(UNKNOWN, unknown)


def _alike(
    engine: str,
    result: Mapping[str, Any],
    phase: str,
    outcome: str,
    rows: Sequence[Mapping[str, Any]],
) -> Advice:
    """One sentence for the rows of an engine and a phase that have the same verdict."""
    ideals = [value for row in rows if (value := _ideal(result, row)) is not None]
    low, high = min(row["ratio_low"] for row in rows), max(row["ratio_high"] for row in rows)
    count = result["threads"]
    machine = f"{count} thread{'s' * (count != 1)}{_dtypes(result, rows)}"
    ratios = _span([row["ratio"] for row in rows])
    ideal = f"; arithmetic would allow {_span(ideals)}" if ideals else ""
    keys = ("batch", "context", "ratio", "ratio_low", "ratio_high")
    return _advice(
        PAYS if outcome == "faster" else PAYS_NOT,
        f"{HEADS[outcome]} in {engine} on this machine ({machine}), {PHASES[phase]} "
        f"{_sizes(rows)}: {ratios} times the dense model's tokens per second ({low:.2f} to "
        f"{high:.2f} over the rounds{ideal}).",
        engine=engine,
        phase=phase,
        rows=[{key: row[key] for key in keys} | {"ideal": _ideal(result, row)} for row in rows],
    )


def _dtypes(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The dtypes of `rows`, and those of dense if they differ."""
    work = {(row["phase"], row["batch"], row["context"]) for row in rows}
    dense = [
        row
        for row in result["rows"]
        if row["label"] == "dense" and (row["phase"], row["batch"], row["context"]) in work
    ]
    own, theirs = (
        _listed(sorted({row["dtype"] for row in some if row.get("dtype")}))
        for some in (rows, dense)
    )
    if not own:  # an engine with one type for all
        own = theirs = result["dtype"] if isinstance(result.get("dtype"), str) else ""
    return (f", {own}" if own else "") + (f", dense {theirs}" if theirs not in ("", own) else "")


def _sizes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Batch sizes and context lengths in words.

    >>> _sizes([{"batch": 1, "context": 128}, {"batch": 1, "context": 512}])
    'at batch 1 (128 and 512 tokens)'
    """
    contexts: dict[int, list[str]] = {}
    for row in rows:
        contexts.setdefault(row["batch"], []).append(str(row["context"]))
    batches = [f"{batch} ({_listed(lengths)} tokens)" for batch, lengths in contexts.items()]
    return f"at batch {_listed(batches)}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _span(values: Sequence[float]) -> str:
    """The smallest and the largest value; only one if both look the same."""
    return " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))


def _ideal(result: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    ideal = result.get("ideal_ratio", {}).get(row["label"], {}).get(row["phase"])
    return ideal.get(str(row["batch"])) if isinstance(ideal, Mapping) else ideal


def _quality(report: Mapping[str, Any], label: str) -> Iterator[Advice]:
    for text, rows in report.get("texts", {}).items():
        if label not in rows:
            continue
        own, static = rows[label], rows.get("static")
        if (shape := report.get("run", {}).get("shape", {})).get("granularity"):
            yield _copies(text, own, shape["active_fraction"])
            continue
        cost = (
            f"On {text} it costs {own['dnll']:.3f} nats per token against dense (perplexity "
            f"{own['perplexity']:.2f} from {rows['dense']['perplexity']:.2f})"
        )
        because = {"text": text, "dnll": own["dnll"], "error": own["dnll_standard_error"]}
        if static is None:
            end = "; it was not compared with static pruning."
            yield _advice(UNKNOWN, cost + end, **because)
            continue
        gain, error = own["gain_over_static"], own["gain_standard_error"]
        needed = needed_errors(own["windows"])
        because |= {"static_dnll": static["dnll"], "gain": gain, "gain_error": error}
        because |= {"windows": own["windows"], "needed_errors": needed}
        sure = error is not None and needed is not None and gain > needed * error
        pruned = f"static pruning to as many active neurons costs {static['dnll']:.3f}"
        if sure:
            end = f"; {pruned}: routing saves {gain:.3f}."
        elif gain > 0:
            end = f"; {pruned}: {gain:.3f} more, which may be chance on so little text."
        else:
            end = f"; {pruned}, NO MORE: a smaller dense model does as well, and needs no experts."
        yield _advice(PAYS if sure else PAYS_NOT, cost + end, **because)


def _copies(text: str, own: Mapping[str, Any], times: float) -> Advice:
    """Whether copies are surely better than the dense model that they were made of."""
    dnll, error, needed = own["dnll"], own["dnll_standard_error"], needed_errors(own["windows"])
    sure = error is not None and needed is not None and -dnll > needed * error
    return _advice(
        PAYS if sure else PAYS_NOT,
        f"{'Better' if sure else 'NOT surely better'} than dense on {text}: {dnll:+.3f} nats per "
        f"token, for {times:.2f} times the computation in an FFN; the control is the dense model "
        "trained on the same text.",
        **{"text": text, "dnll": dnll, "error": error},
    )


AXES = {
    "bytes_read": ("at batch 1, where bytes read per token decide", "B"),
    "operations": ("for prefill and large batches, where operations decide", " multiply-adds"),
}
"""When a cost decides, and its unit."""

STANDINGS = {
    "ahead": (PAYS, "A best point"),
    "tied": (PAYS_NOT, "NO BETTER than a rival"),
    "alone": (UNKNOWN, "No rival costs as little"),
    "beaten": (PAYS_NOT, "NOT a best point"),
}
"""How the run stands among its rivals, the best first: the verdict and the start of a sentence."""


def _rivals(report: Mapping[str, Any], label: str) -> Iterator[Advice]:
    """One sentence for each kind of cost; none where no rival was measured."""
    points = frontier.averages(report.get("frontier", []))
    if not any(point["kind"] == "rival" for point in points):
        return
    for axis, (when, _) in AXES.items():
        own = [p for p in points if p["own"] and p["label"].startswith(label) and p[axis]]
        # In another type it needs as many operations, and loses more.
        forms = [form for form in own if axis == "bytes_read" or form["label"] == label]
        standings = [_standing(form, points, axis) for form in forms]
        best = min((word for word, _ in standings), key=[*STANDINGS].index, default="beaten")
        verdict, head = STANDINGS[best]
        standings.sort(key=lambda one: one[0] != best)
        levels = report.get("rivals", {}).get("levels") if axis == "bytes_read" else None
        sentence = f"{head} {when}: {'; '.join(text for _, text in standings)}."
        sentence = f"{sentence} {flattered(levels)}".strip()
        yield _advice(verdict, sentence, axis=axis, standings=[word for word, _ in standings])


def _standing(
    own: Mapping[str, Any], points: Sequence[Mapping[str, Any]], axis: str
) -> tuple[str, str]:
    """A key of `STANDINGS`, and by how much."""
    rivals = frontier.rivals(points, axis)
    text = _named(own, axis)
    if name := frontier.better(own, points, axis):
        rival = next(rival for rival in rivals if rival["label"] == name)
        return "beaten", f"{text} is beaten by {_named(rival, axis)}"
    cheap = [rival for rival in rivals if rival[axis] <= frontier.SLACK * own[axis]]
    if cheap:
        second = min(cheap, key=lambda rival: rival["kl"])
        gain = second["kl"] - own["kl"]
        if second["kl"] <= frontier.SLACK * own["kl"]:
            return "tied", f"{text} loses about as much as {_named(second, axis)}"
        text += f" has {gain:.3f} less KL than {_named(second, axis)}"
    else:
        text += " costs less than any rival"
    finer = [rival for rival in rivals if frontier.SLACK * rival["kl"] < own["kl"]]
    if finer:
        first = min(finer, key=lambda rival: rival[axis])
        text += (
            f", and {_named(first, axis)} loses less at {first[axis] / own[axis]:.2f} times that"
        )
    return "ahead" if cheap else "alone", text


def _named(point: Mapping[str, Any], axis: str) -> str:
    """A point with its cost and loss: `q4_K_M (103.7 MB, KL 0.021, indistinguishable)`."""
    cost = " ".join(large(point[axis], AXES[axis][1]).split())
    return f"{point['label']} ({cost}, KL {point['kl']:.3f}, {band(point['kl'])})"


def _memory(models: Mapping[str, Any], label: str) -> Iterator[Advice]:
    own, dense = models.get(label), models.get("dense")
    if not own or not dense:
        return
    size, dense_size = own["weight_bytes"], dense["weight_bytes"]
    share = own["parameters_active"] / own["parameters_total"]
    saves = size / dense_size < 1 - CLEAR
    yield _advice(
        PAYS if saves else PAYS_NOT,
        f"It holds {size / 1e6:,.0f} MB of weights, {size / dense_size:.2f} times dense, of which "
        f"{share:.0%} are used for a token: "
        + ("memory is saved." if saves else "NO MEMORY IS SAVED, all experts must be held."),
        weight_bytes=size,
        dense_weight_bytes=dense_size,
    )


def _routing(layers: list[Mapping[str, Any]]) -> Iterator[Advice]:
    dead = {layer["layer"]: layer["dead"] for layer in layers if layer["dead"]}
    if dead:
        count = sum(dead.values())
        where = ", ".join(map(str, dead))
        yield _advice(
            PAYS_NOT,
            f"{count} dead experts (below 5 % of the mean load; in layers {where}): they take "
            "memory and do almost nothing on these texts.",
            dead=count,
            layers=[*dead],
        )
