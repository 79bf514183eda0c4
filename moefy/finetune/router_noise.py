"""Noise on a router's choices in training: logit noise, expert dropout, capacity, cold experts."""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.config.finetune import Settings
from moefy.finetune import losses


def is_noisy(settings: Settings, progress: float) -> bool:
    """Whether anything changes a choice when that share of the training is done."""
    # `progress` last: a compiled layer is compiled again when a number changes that it has read.
    early = (settings.noise or settings.cold_expert_share) and progress < settings.explore_until
    return bool(early or settings.expert_dropout or settings.capacity_factor)


def noisy_choices(settings: Settings, progress: float, z_TE: Tensor, k: int) -> Tensor:
    """Indices of the chosen experts, (T, K); -1 for a choice that the capacity drops.

    Logit noise is annealed to zero at `explore_until`, where the share of the coldest expert ends.
    """
    num_tokens, num_experts = z_TE.shape
    until = settings.explore_until
    early = 1 - progress / until if progress < until else 0.0
    score_TE = z_TE + torch.randn_like(z_TE) * (settings.noise * early)
    if settings.expert_dropout:
        dropped_E = torch.rand(num_experts, device=z_TE.device) < settings.expert_dropout
        enough_K = torch.randperm(num_experts, device=z_TE.device)[:k]
        dropped_E[enough_K] = False
        score_TE = score_TE.masked_fill(dropped_E, -torch.inf)
    index_TK = score_TE.topk(k, dim=-1).indices
    if settings.cold_expert_share and early:
        coldest = losses.load(index_TK, num_experts).argmin()
        forced_T = torch.rand(num_tokens, device=z_TE.device) < settings.cold_expert_share
        forced_T &= (index_TK != coldest).all(-1)
        index_TK[forced_T, -1] = coldest
    if settings.capacity_factor:
        capacity = max(1, int(settings.capacity_factor * num_tokens * k / num_experts))
        index_TK = with_capacity(score_TE, index_TK, capacity)
    return index_TK


def with_capacity(score_TE: Tensor, index_TK: Tensor, capacity: int) -> Tensor:
    """The choices when no expert takes more than `capacity` tokens; -1 for a choice dropped.

    Each expert keeps the tokens that score highest. The other tokens choose once more, among the
    experts that were not full. A token that finds its second choice full is dropped.
    """
    num_experts, k = score_TE.shape[1], index_TK.shape[1]
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, index_TK, True)
    full_E = chosen_TE.sum(0) >= capacity
    place_TE = score_TE.masked_fill(~chosen_TE, -torch.inf).argsort(0, descending=True).argsort(0)
    chosen_TE &= place_TE < capacity
    left_T = k - chosen_TE.sum(-1)
    other_TE = score_TE.masked_fill(chosen_TE | full_E, -torch.inf)
    rank_TE = other_TE.argsort(-1, descending=True).argsort(-1)
    more_TE = (rank_TE < left_T[:, None]) & other_TE.isfinite()
    taken_E = chosen_TE.sum(0)
    for expert in range(num_experts):
        late = more_TE[:, expert].cumsum(0) > capacity - taken_E[expert]
        more_TE[late, expert] = False
    chosen_TE |= more_TE
    place_TK = chosen_TE.float().topk(k, dim=-1)
    return torch.where(place_TK.values > 0, place_TK.indices, -1)
