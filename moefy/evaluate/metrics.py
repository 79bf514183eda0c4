"""Perplexity, KL divergence and agreement with the dense model on windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """A model on some text, against the dense model, as sums per window."""

    tokens_W: tuple[int, ...]
    nll_W: tuple[float, ...]
    """Summed negative log-likelihood of the true next tokens, nats."""
    kl_W: tuple[float, ...]
    """Summed KL(dense || model) over the same places, nats."""
    agree_W: tuple[int, ...]
    """Places where the likeliest token is the dense model's."""

    @property
    def num_tokens(self) -> int:
        """Predicted tokens."""
        return sum(self.tokens_W)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, nats."""
        return sum(self.nll_W) / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(self.nll)

    @property
    def kl(self) -> float:
        """Mean KL divergence from the dense model, nats per token."""
        return sum(self.kl_W) / self.num_tokens

    @property
    def agreement(self) -> float:
        """Share of places where the likeliest token is the dense model's."""
        return sum(self.agree_W) / self.num_tokens


def compare(
    dense: Any,
    models: Mapping[str, Any],
    windows: list[Tensor],
    *,
    keep: int | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Score]:
    """The score of every model, and of dense as "dense", on windows of token ids (T,).

    All models take a window before the next one, so the dense logits are computed once. With
    `keep`, only the last `keep` tokens of each window are scored; the others are context.
    """
    both = compare_with({"dense": dense}, models, windows, keep=keep, watch=watch)
    return {name: score for (name, _), score in both.items()}


def compare_with(
    references: Mapping[str, Any],
    models: Mapping[str, Any],
    windows: list[Tensor],
    *,
    keep: int | None = None,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[tuple[str, str], Score]:
    """The score of each model, and of each reference, against each reference, by both names."""
    rows: dict[tuple[str, str], list[tuple[int, float, float, int]]] = {}
    for done, ids_T in enumerate(windows, 1):
        given = {n: log_probabilities(model, ids_T, keep) for n, model in references.items()}
        for name in (*references, *models):
            own_TV = given[name] if name in given else log_probabilities(models[name], ids_T, keep)
            for other, other_TV in given.items():
                rows.setdefault((name, other), []).append(_sums(own_TV, other_TV, ids_T))
        watch(done, len(windows))
    return {pair: Score(*zip(*some, strict=True)) for pair, some in rows.items()}


def log_probabilities(model: Any, ids_T: Tensor, keep: int | None = None) -> Tensor:
    """Float32 log-probabilities of the next token at every place but the last, (T - 1, V).

    With `keep`, of the last `keep` tokens.
    """
    some = {} if keep is None else {"logits_to_keep": min(keep + 1, len(ids_T))}
    with torch.inference_mode():
        logits_TV = model(ids_T[None].to(model.device), use_cache=False, **some).logits[0, :-1]
        return logits_TV.float().log_softmax(-1)


def _sums(log_p_TV: Tensor, reference_TV: Tensor, ids_T: Tensor) -> tuple[int, float, float, int]:
    true_T1 = ids_T[-len(log_p_TV) :, None].to(log_p_TV.device)
    nll = -float(log_p_TV.gather(1, true_T1).sum())
    if log_p_TV is reference_TV:
        return len(true_T1), nll, 0.0, len(true_T1)
    kl, agree = 0.0, 0
    # A few rows at a time stay in the processor's cache: three times faster.
    for p_TV, q_TV in zip(reference_TV.split(64), log_p_TV.split(64), strict=True):
        kl += float(torch.linalg.vecdot(p_TV.exp(), p_TV - q_TV).sum())
        agree += int((p_TV.argmax(1) == q_TV.argmax(1)).sum())
    return len(true_T1), nll, kl, agree


def standard_error(score: Score, dense: Score | None = None) -> float | None:
    """Standard error of the mean NLL over windows, or with `dense` of the difference from it.

    The difference is paired, so windows that are hard for both do not widen it.
    """
    tokens_W = torch.tensor(score.tokens_W, dtype=torch.float64)
    sum_W = torch.tensor(score.nll_W, dtype=torch.float64)
    if dense is not None:
        sum_W -= torch.tensor(dense.nll_W, dtype=torch.float64)
    count = len(tokens_W)
    if count < 2:
        return None
    residual_W: Tensor = sum_W - tokens_W * (sum_W.sum() / tokens_W.sum())
    return float(residual_W.square().sum().mul(count / (count - 1)).sqrt() / tokens_W.sum())


def needed_errors(windows: int) -> float | None:
    """The quantile of Student's t at 95 %: the standard errors that make a difference certain.

    It is 12.7 with two windows and 2.0 with many.
    """
    return float(stats.t.ppf(0.975, windows - 1)) if windows > 1 else None
