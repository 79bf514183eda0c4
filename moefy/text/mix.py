"""Texts of several sources as one, each with its share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moefy.text.tokens import Part, Tokens, digest


def mix(sources: Sequence[Tokens], shares: Sequence[float], num_rows: int) -> Tokens:
    """The sequences of all sources, of which `num_rows` are trained on, each source by its share.

    All that is held out comes last, source by source. A source that has too few sequences repeats
    them, which a note says.
    """
    fits = [len(tokens.ids_BT) - tokens.num_heldout for tokens in sources]
    names = [Path(tokens.source).name for tokens in sources]
    parts, rows, notes, start = [], [], [], 0
    wanted = split(num_rows, shares)
    for name, tokens, fit, count, share in zip(names, sources, fits, wanted, shares, strict=True):
        name = name if names.count(name) == 1 else tokens.source
        epochs = count / fit
        rows.append(start + torch.arange(count) % fit)
        start += fit
        parts.append(
            Part(name, tokens.source, share, tokens.num_documents, fit, epochs, tokens.num_heldout)
        )
        notes += [f"{name}: {note}" for note in tokens.notes]
        if epochs > 1:
            notes.append(f"{name}: its {fit:,} sequences are repeated {epochs:.1f} times")
    ids_BT = _joined([tokens.ids_BT for tokens in sources], fits)
    learned_BT = _joined([tokens.learned for tokens in sources], fits)
    return Tokens(
        ids_BT,
        num_heldout=len(ids_BT) - start,
        source=", ".join(f"{part.name} ({part.share:.0%})" for part in parts),
        sha256=digest(ids_BT),
        num_documents=sum(part.documents for part in parts),
        notes=tuple(notes),
        parts=tuple(parts),
        fit_N=torch.cat(rows),
        learned_BT=None if learned_BT.all() else learned_BT,
    )


def _joined(sources: Sequence[Tensor], fits: Sequence[int]) -> Tensor:
    """All rows to train on, then all that are held out."""
    pairs = list(zip(sources, fits, strict=True))
    return torch.cat([rows[:fit] for rows, fit in pairs] + [rows[fit:] for rows, fit in pairs])


def split(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `total`, each nearest to its share of it.

    >>> split(10, [0.5, 0.26, 0.24])
    [5, 3, 2]

    Source: the largest remainder method.
    """
    counts = [int(total * share) for share in shares]
    order = sorted(range(len(shares)), key=lambda n: (counts[n] - total * shares[n], n))
    for n in order[: total - sum(counts)]:
        counts[n] += 1
    return counts
