"""What readings say, in the words of `report.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moefy.evaluate.metrics import Score, standard_error
from moefy.evaluate.scoring import Choices, TextResult, merged
from moefy.models import routing

TOP_TOKENS = 8
"""Told of each expert."""

SEEN_ENOUGH = 5
"""Times that a token must occur to be told of an expert."""

STATIC = "static"
"""The control that a run must beat; its label."""

MOST_PAIRED = 32
"""Experts up to which it is told which are chosen together."""


def score_rows(readings: Mapping[str, TextResult], num_bytes: int) -> dict[str, dict[str, Any]]:
    """One text's scores by label; the first is dense."""
    dense = next(iter(readings.values())).score
    rows = {label: _row(reading.score, dense, num_bytes) for label, reading in readings.items()}
    if STATIC in readings:
        static = readings[STATIC].score
        for label, reading in readings.items():
            rows[label]["gain_over_static"] = static.nll - reading.score.nll
            rows[label]["gain_standard_error"] = standard_error(static, reading.score)
    return rows


def _row(score: Score, dense: Score, num_bytes: int) -> dict[str, Any]:
    return {
        "tokens": score.num_tokens,
        "windows": len(score.tokens_W),
        "nll": score.nll,
        "perplexity": score.perplexity,
        "bits_per_byte": sum(score.nll_W) / math.log(2) / num_bytes if num_bytes else None,
        "standard_error": standard_error(score),
        "dnll": score.nll - dense.nll,
        "dnll_standard_error": standard_error(score, dense),
        "kl": score.kl,
        "top1_agreement": score.agreement,
    }


def num_bytes(tokenizer: Any, windows: Sequence[Tensor]) -> int:
    """UTF-8 bytes of the tokens that are predicted: all but the first of each window."""
    texts = [
        tokenizer.decode(
            ids_T[1:].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for ids_T in windows
    ]
    return sum(len(text.encode("utf-8")) for text in texts)


def routing_tables(
    by_text: Mapping[str, Mapping[str, TextResult]],
    labels: Sequence[str],
    piece: Callable[[int], str],
) -> dict[str, dict[str, Any]]:
    """How each label routes, over all texts and on each; `piece` writes a token id."""
    found: dict[str, dict[str, Any]] = {}
    for label in labels:
        read = {text: readings[label].choices for text, readings in by_text.items()}
        if not any(read.values()):
            continue
        layers = [merged(parts) for parts in zip(*read.values(), strict=True)]
        found[label] = {
            "layers": [_layer(layer, piece) for layer in layers],
            "by_text": {
                text: {"layers": [_balance(layer) for layer in choices]}
                for text, choices in read.items()
            },
        }
    return found


def _balance(layer: Choices) -> dict[str, Any]:
    return {"layer": layer.layer, **routing.balance(load_of(layer))}


def _layer(layer: Choices, piece: Callable[[int], str]) -> dict[str, Any]:
    told = _balance(layer)
    if len(layer.count_E) <= MOST_PAIRED:
        told["coactivation_EE"] = [
            [round(both / layer.tokens, 4) for both in row] for row in layer.both_EE
        ]
    return told | {"top_tokens": _top_tokens(layer, piece)}


def _top_tokens(layer: Choices, piece: Callable[[int], str]) -> list[list[dict[str, Any]]]:
    """For each expert, the tokens that go to it most surely, of those that occur often enough.

    Shares are drawn towards the expert's share of all tokens, as if each token had occurred a few
    times more: so a rare token does not come first by luck.
    """
    experts = []
    each = layer.tokens and sum(layer.count_E) / layer.tokens  # experts per token
    for expert, count in enumerate(layer.count_E):
        usual = count / max(layer.tokens, 1)
        ranked = []
        for token, count_E in layer.of_token.items():
            times = round(sum(count_E) / each)
            if times >= SEEN_ENOUGH:
                drawn = (count_E[expert] + SEEN_ENOUGH * usual) / (times + SEEN_ENOUGH)
                ranked.append((drawn, int(token), count_E[expert] / times, times))
        ranked.sort(key=lambda row: (-row[0], row[1]))
        experts.append(
            [
                {"token": piece(token), "share": round(share, 3), "times": times}
                for drawn, token, share, times in ranked[:TOP_TOKENS]
                if drawn > usual
            ]
        )
    return experts


def load_of(layer: Choices) -> Tensor:
    """Share of the choices that each expert has."""
    count_E = torch.tensor(layer.count_E, dtype=torch.float64)
    return count_E / count_E.sum().clamp_min(1)


def robustness_row(
    reading: TextResult, dense: TextResult, reference: Sequence[Choices]
) -> dict[str, Any]:
    """A model on a text, and how its routing there differs from that on the `reference`."""
    row: dict[str, Any] = {
        "tokens": reading.score.num_tokens,
        "perplexity": reading.score.perplexity,
        "dnll": reading.score.nll - dense.score.nll,
        "kl": reading.score.kl,
        "routing_entropy": None,
        "routing_drift": None,
    }
    if reading.choices and reference:
        loads = [load_of(layer) for layer in reading.choices]
        drifts = [
            routing.drift(load_E, load_of(layer))
            for load_E, layer in zip(loads, reference, strict=True)
        ]
        row["routing_entropy"] = sum(routing.balance(load_E)["entropy"] for load_E in loads) / len(
            loads
        )
        row["routing_drift"] = sum(drifts) / len(drifts)
    return row
