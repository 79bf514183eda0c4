"""Rows of `report.json` from the results of candidates on texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from moefy.evaluate.metrics import Score, standard_error
from moefy.evaluate.scoring import Choices, TextResult, merged
from moefy.models import routing

TOP_TOKENS = 8
"""Tokens listed for each expert."""

SEEN_ENOUGH = 5
"""Occurrences of a token that is listed for an expert, at least."""

STATIC = "static"
"""Label of the control that a run must beat."""

MOST_PAIRED = 32
"""The largest number of experts whose coactivation is reported."""


def score_rows(results: Mapping[str, TextResult], num_bytes: int) -> dict[str, dict[str, Any]]:
    """One text's scores by label; the first is dense."""
    dense = next(iter(results.values())).score
    rows = {label: _row(result.score, dense, num_bytes) for label, result in results.items()}
    if STATIC in results:
        static = results[STATIC].score
        for label, result in results.items():
            rows[label]["gain_over_static"] = static.nll - result.score.nll
            rows[label]["gain_standard_error"] = standard_error(static, result.score)
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
    """UTF-8 bytes of the predicted tokens: all but the first of each window."""
    rows = [ids_T[1:].tolist() for ids_T in windows]
    plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = tokenizer.batch_decode(rows, **plain)
    return sum(len(text.encode("utf-8")) for text in texts)


def routing_tables(
    by_text: Mapping[str, Mapping[str, TextResult]],
    labels: Sequence[str],
    piece: Callable[[int], str],
) -> dict[str, dict[str, Any]]:
    """The routing of each label, over all texts and on each one; `piece` decodes a token id."""
    rows: dict[str, dict[str, Any]] = {}
    for label in labels:
        read = {text: results[label].choices for text, results in by_text.items()}
        if not any(read.values()):
            continue
        layers = [merged(parts) for parts in zip(*read.values(), strict=True)]
        rows[label] = {
            "layers": [_layer(layer, piece) for layer in layers],
            "by_text": {
                text: {"layers": [_balance(layer) for layer in choices]}
                for text, choices in read.items()
            },
        }
    return rows


def _balance(layer: Choices) -> dict[str, Any]:
    return {"layer": layer.layer, **routing.balance(load_of(layer))}


def _layer(layer: Choices, piece: Callable[[int], str]) -> dict[str, Any]:
    row = _balance(layer)
    if len(layer.count_E) <= MOST_PAIRED:
        row["coactivation_EE"] = [
            [round(both / layer.tokens, 4) for both in both_E] for both_E in layer.both_EE
        ]
    return row | {"top_tokens": _top_tokens(layer, piece)}


def _top_tokens(layer: Choices, piece: Callable[[int], str]) -> list[list[dict[str, Any]]]:
    """For each expert, the frequent tokens of which it gets the largest share.

    Each share is shrunk towards the expert's share of all tokens, as if the token had occurred a
    few times more, so that no rare token comes first by luck.
    """
    experts = []
    each = layer.tokens and sum(layer.count_E) / layer.tokens  # experts per token
    for expert, count in enumerate(layer.count_E):
        usual = count / max(layer.tokens, 1)
        ranked = []
        for token, count_E in layer.of_token.items():
            times = round(sum(count_E) / each)
            if times >= SEEN_ENOUGH:
                shrunk = (count_E[expert] + SEEN_ENOUGH * usual) / (times + SEEN_ENOUGH)
                ranked.append((shrunk, int(token), count_E[expert] / times, times))
        ranked.sort(key=lambda row: (-row[0], row[1]))
        experts.append(
            [
                {"token": piece(token), "share": round(share, 3), "times": times}
                for shrunk, token, share, times in ranked[:TOP_TOKENS]
                if shrunk > usual
            ]
        )
    return experts


def load_of(layer: Choices) -> Tensor:
    """Share of the choices that each expert got."""
    count_E = torch.tensor(layer.count_E, dtype=torch.float64)
    return count_E / count_E.sum().clamp_min(1)


def robustness_row(
    result: TextResult, dense: TextResult, reference: Sequence[Choices]
) -> dict[str, Any]:
    """A model on a text, and the drift of its routing from that on the `reference`."""
    row: dict[str, Any] = {
        "tokens": result.score.num_tokens,
        "perplexity": result.score.perplexity,
        "dnll": result.score.nll - dense.score.nll,
        "kl": result.score.kl,
        "routing_entropy": None,
        "routing_drift": None,
    }
    if result.choices and reference:
        loads = [load_of(layer) for layer in result.choices]
        drifts = [
            routing.drift(load_E, load_of(layer))
            for load_E, layer in zip(loads, reference, strict=True)
        ]
        row["routing_entropy"] = fmean(routing.balance(load_E)["entropy"] for load_E in loads)
        row["routing_drift"] = fmean(drifts)
    return row
