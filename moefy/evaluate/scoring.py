"""Score models on text, and count the experts that its tokens go to."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.evaluate.cache import Cache, tensors_digest
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.metrics import Score, compare
from moefy.models import routing

FREQUENT = 100
"""The most frequent tokens of a text, whose experts are counted one by one."""


@dataclass(frozen=True)
class Choices:
    """The choices of one layer's router, as counts that add up over texts."""

    layer: int
    tokens: int
    count_E: list[int]
    """Choices of each expert."""
    both_EE: list[list[int]]
    """Tokens that went to both experts; the diagonal is `count_E`."""
    of_token: dict[str, list[int]]
    """Choices of each expert for each frequent token, by token id."""


@dataclass(frozen=True)
class TextResult:
    """A model on a text: its score, and the choices of each MoE layer."""

    score: Score
    choices: list[Choices]


def scored(
    candidates: Sequence[Candidate],
    windows: list[Tensor],
    cache: Cache,
    model: Callable[[Candidate], Any],
    *,
    keep: int | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, TextResult]:
    """The result of every candidate on `windows`; see `compare`. The first one is dense.

    `model` loads a candidate whose score the cache lacks.

    Raises:
        MoefyError: code 6, for a model that computes NaN or an infinite loss.
    """
    dense, *others = candidates
    common = {"windows": tensors_digest(windows), "keep": keep, "dense": dense.digest}
    keys = {c.label: {**common, "model": c.digest} for c in candidates}
    values = {label: cache.get("score", key) for label, key in keys.items()}
    if None in values.values():
        models = {c.label: model(c) for c in others if values[c.label] is None}
        results = score_models(model(dense), models, windows, keep, watch)
        _check_finite(results, {c.label: c for c in candidates})
        for label, result in results.items():
            values[label] = cache.put("score", keys[label], dataclasses.asdict(result))
    return {label: _result(value) for label, value in values.items() if value}


def _check_finite(results: Mapping[str, TextResult], candidates: Mapping[str, Candidate]) -> None:
    for label, result in results.items():
        candidate, loss = candidates[label], result.score.nll
        if math.isfinite(loss):
            continue
        check = f"; check it with `moefy verify {candidate.folder}`" if candidate.summary else ""
        raise MoefyError(
            f"{candidate.folder or label} computes no finite likelihood (loss {loss:g}); "
            f"expected finite weights, or a --compute-dtype that holds its values{check}",
            code=6,
        )


def score_models(
    dense: Any,
    models: Mapping[str, Any],
    windows: list[Tensor],
    keep: int | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, TextResult]:
    """The scores of `compare`, with the routers' choices on the same tokens."""
    with contextlib.ExitStack() as stack:
        recorded = {
            label: stack.enter_context(routing.recorded(model)) for label, model in models.items()
        }
        scores = compare(dense, models, windows, keep=keep, watch=watch)
    ids_T = torch.cat(windows)
    experts = {
        label: {block.layer: block.num_experts for block in routing.moe_blocks(model)}
        for label, model in models.items()
    }
    return {
        label: TextResult(
            score,
            [
                _counted(layer, torch.cat(parts), ids_T, experts[label][layer])
                for layer, parts in recorded.get(label, {}).items()
            ],
        )
        for label, score in scores.items()
    }


def merged(parts: Sequence[Choices]) -> Choices:
    """The choices of one layer over several texts."""
    of_token: dict[str, list[int]] = {}
    for part in parts:
        for token, count_E in part.of_token.items():
            of_token[token] = _sum([of_token[token], count_E]) if token in of_token else count_E
    return Choices(
        parts[0].layer,
        sum(part.tokens for part in parts),
        _sum([part.count_E for part in parts]),
        [_sum(list(rows)) for rows in zip(*(part.both_EE for part in parts), strict=True)],
        of_token,
    )


def _sum(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _counted(layer: int, index_TK: Tensor, ids_T: Tensor, num_experts: int) -> Choices:
    index_TK = index_TK.long().cpu()
    chosen_TE = torch.zeros(len(index_TK), num_experts).scatter_(1, index_TK, 1.0)
    of_token = {
        str(token): chosen_TE[ids_T == token].sum(0).int().tolist()
        for token, _ in Counter(ids_T.tolist()).most_common(FREQUENT)
    }
    both_EE = (chosen_TE.T @ chosen_TE).round().int()
    return Choices(layer, len(index_TK), both_EE.diagonal().tolist(), both_EE.tolist(), of_token)


def _result(value: Mapping[str, Any]) -> TextResult:
    score = Score(**{name: tuple(sums) for name, sums in value["score"].items()})
    return TextResult(score, [Choices(**layer) for layer in value["choices"]])
