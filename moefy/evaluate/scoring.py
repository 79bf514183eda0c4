"""Models read text once: how likely they find it, and which experts its tokens go to."""

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
from moefy.evaluate.cache import VERSIONS, Cache, tensors_digest
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.metrics import Score, compare
from moefy.models import routing

FREQUENT = 100
"""How many tokens of a text are told apart: its most frequent ones."""


@dataclass(frozen=True)
class Choices:
    """What one layer's router chose: counts, which add up over texts."""

    layer: int
    tokens: int
    count_E: list[int]
    """Choices of each expert."""
    both_EE: list[list[int]]
    """Tokens that went to both experts; to each one on the diagonal."""
    of_token: dict[str, list[int]]
    """Choices of each expert by the text's frequent tokens, by token id."""


@dataclass(frozen=True)
class TextResult:
    """A model on a text; a dense one chooses nothing."""

    score: Score
    choices: list[Choices]


@dataclass(frozen=True)
class Scorer:
    """The models that read, loaded when there is something that they have not read."""

    cache: Cache
    stages: Sequence[Candidate]
    """The dense model first."""
    opened: Callable[[str], Any]
    """The model of a label."""

    def read(
        self,
        windows: list[Tensor],
        *,
        labels: Sequence[str] | None = None,
        keep: int | None = None,
        watch: Callable[[int, int], None] = lambda *_: None,
    ) -> dict[str, TextResult]:
        """What every stage, or those of `labels`, makes of `windows`; see `compare`.

        Raises:
            MoefyError: code 6, for a model that computes NaN or an infinite loss.
        """
        dense, stages = self.stages[0], self.stages
        if labels is not None:
            stages = [dense, *(stage for stage in stages[1:] if stage.label in labels)]
        key = {"windows": tensors_digest(windows), "keep": keep, "dense": dense.digest, **VERSIONS}
        keys = {stage.label: key | {"model": stage.digest} for stage in stages}
        kept = {label: self.cache.get("reading", one) for label, one in keys.items()}
        found: dict[str, Any] = {label: value for label, value in kept.items() if value}
        lacking = [label for label in keys if label not in found]
        if lacking:
            reference = self.opened(dense.label)
            models = {label: self.opened(label) for label in lacking if label != dense.label}
            readings = read(reference, models, windows, keep, watch)
            _check_finite(readings, stages)
            for label, reading in readings.items():
                value = dataclasses.asdict(reading)
                found[label] = self.cache.put("reading", keys[label], value)
        return {label: _reading(found[label]) for label in keys}


def _check_finite(readings: Mapping[str, TextResult], stages: Sequence[Candidate]) -> None:
    for stage in stages:
        loss = readings[stage.label].score.nll if stage.label in readings else 0.0
        if math.isfinite(loss):
            continue
        look = f"; `moefy verify {stage.folder}` looks for damage" if stage.summary else ""
        raise MoefyError(
            f"{stage.folder or stage.label} computes no finite likelihood (loss {loss:g}); "
            f"expected finite weights, or a --compute-dtype that holds its values{look}",
            code=6,
        )


def read(
    dense: Any,
    models: Mapping[str, Any],
    windows: list[Tensor],
    keep: int | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, TextResult]:
    """The scores of `compare`, and what routers chose meanwhile."""
    with contextlib.ExitStack() as stack:
        seen = {
            label: stack.enter_context(routing.recorded(model)) for label, model in models.items()
        }
        scores = compare(dense, models, windows, keep=keep, watch=watch)
    ids_T = torch.cat(windows)
    return {
        label: TextResult(
            score,
            [
                _counted(layer, torch.cat(parts), ids_T, _experts(models[label], layer))
                for layer, parts in seen.get(label, {}).items()
            ],
        )
        for label, score in scores.items()
    }


def merged(parts: Sequence[Choices]) -> Choices:
    """One layer's choices over several texts."""
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


def _experts(model: Any, layer: int) -> int:
    return routing.num_experts(routing.routers(model)[layer])


def _counted(layer: int, index_TK: Tensor, ids_T: Tensor, experts: int) -> Choices:
    index_TK = index_TK.long()
    chosen_TE = torch.zeros(len(index_TK), experts).scatter_(1, index_TK, 1.0)
    of_token = {
        str(token): chosen_TE[ids_T == token].sum(0).int().tolist()
        for token, _ in Counter(ids_T.tolist()).most_common(FREQUENT)
    }
    both_EE = (chosen_TE.T @ chosen_TE).round().int()
    return Choices(layer, len(index_TK), both_EE.diagonal().tolist(), both_EE.tolist(), of_token)


def _reading(value: Mapping[str, Any]) -> TextResult:
    score = Score(**{name: tuple(sums) for name, sums in value["score"].items()})
    return TextResult(score, [Choices(**layer) for layer in value["choices"]])
