"""Which experts a run cannot do without: figures, and the advice on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from moefy.evaluate.metrics import Score, standard_error

CRITICAL = 0.1
"""Nats per token. A run that loses more without an expert, a tenth of perplexity, depends on it."""

NAMED = 3
"""Experts that the advice names, the most critical first."""


def summary(
    experts: Sequence[tuple[int, int]], windows: Sequence[Tensor], rows: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Figures of each expert from the losses of all windows: the whole model's, those without each
    expert, and perhaps those with its shadow."""
    tokens = tuple(len(ids_T) - 1 for ids_T in windows)
    whole, *lost = (Score(tokens, nll_W, (), ()) for nll_W in zip(*rows, strict=True))
    figures = [
        {
            "layer": layer,
            "expert": expert,
            "dnll": score.nll - whole.nll,
            "standard_error": standard_error(score, whole),
        }
        for (layer, expert), score in zip(experts, lost, strict=False)
    ]
    for row, score in zip(figures, lost[len(experts) :], strict=False):
        row |= {
            "shadow_dnll": score.nll - whole.nll,
            "shadow_standard_error": standard_error(score, whole),
        }
    kinds = ("", "shadow_") if len(lost) > len(experts) else ("",)
    return {
        "tokens": whole.num_tokens,
        "windows": len(windows),
        "nll": whole.nll,
        **{f"{kind}mean": fmean(row[f"{kind}dnll"] for row in figures) for kind in kinds},
        **{f"{kind}worst": max(row[f"{kind}dnll"] for row in figures) for kind in kinds},
        "experts": figures,
    }


def advice(
    report: Mapping[str, Any], label: str
) -> Iterator[tuple[str, bool, list[Mapping[str, Any]]]]:
    """A sentence, whether a single expert is critical, and the worst ones; none if not measured."""
    lost = report.get("lost_experts") or {}
    if lost.get("label") != label:
        return
    worst = sorted(lost["experts"], key=lambda row: -row["dnll"])
    critical = sum(row["dnll"] > CRITICAL for row in worst)
    noun = "EXPERT" if critical == 1 else "EXPERTS"
    head = f"{critical} {noun} MUST NOT BE LOST" if critical else "Any one expert may be lost"
    shadows = ""
    if (mean := lost.get("shadow_mean")) is not None:
        most = lost["shadow_worst"]
        shadows = f" With its shadow in its place it loses {mean:.4f}, at most {most:.3f}."
    names = (f"{row['layer']}.{row['expert']} ({row['dnll']:.3f})" for row in worst[:NAMED])
    yield (
        f"{head}: without one of {len(worst):,} it loses {lost['mean']:.4f} nats per token on "
        f"average, and most without layer.expert {', '.join(names)}.{shadows}",
        critical > 0,
        worst[:NAMED],
    )
