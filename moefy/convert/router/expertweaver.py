"""ExpertWeaver's router: an expert's row is the mean of its neurons' gate rows."""

from __future__ import annotations

import torch

from moefy.convert.routed_ffn import level
from moefy.types import FFN, Partition, Profile, Router, Shape


def fit(
    ffn: FFN, profile: Profile, partition: Partition, shape: Shape, *, generator: torch.Generator
) -> Router:
    """Average the gate rows of each expert, without a gate the up rows; nothing is fitted.

    Source: ExpertWeaver (arXiv 2602.15521), equation 11; EMoE (arXiv 2310.10908) does the same. Its
    experts are `expertweaver`'s.
    """
    row_FD = ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD
    return Router(level(row_FD[partition.experts_EN].mean(1), profile.group.gather(profile.x_TD)))
