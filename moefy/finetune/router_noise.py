"""Noise on a router's choices in training: logit noise, expert dropout, capacity, cold experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.finetune import losses


@dataclass(frozen=True)
class RouterNoise:
    """What changes a router's choices, in training only. All off by default."""

    std: float = 0.0
    """Standard deviation added to the logits, annealed to zero at `until`."""
    dropout: float = 0.0
    """Probability that an expert takes no token of a batch."""
    capacity: float = 0.0
    """Capacity factor: most tokens of an expert, as a multiple of an even share. The tokens that
    score lowest go to their next best expert, or to none if that is full too. 0 for no limit."""
    warm: float = 0.0
    """Share of the tokens whose last choice becomes the coldest expert, up to `until`."""
    until: float = 0.5
    """Share of the training after which noise and warm start are off."""

    def active(self, progress: float) -> bool:
        """Whether anything changes a choice at that share of the training."""
        early = progress < self.until and (self.std or self.warm)
        return bool(early or self.dropout or self.capacity)


def noisy_choices(noise: RouterNoise, progress: float, z_TE: Tensor, k: int) -> Tensor:
    """Indices of the chosen experts under `noise`, (T, K); -1 for a choice that is dropped."""
    num_tokens, num_experts = z_TE.shape
    early = 1 - progress / noise.until if progress < noise.until else 0.0
    score_TE = z_TE + torch.randn_like(z_TE) * (noise.std * early)
    if noise.dropout:
        dropped_E = torch.rand(num_experts, device=z_TE.device) < noise.dropout
        dropped_E[torch.randperm(num_experts, device=z_TE.device)[:k]] = (
            False  # enough to choose from
        )
        score_TE = score_TE.masked_fill(dropped_E, -torch.inf)
    index_TK = score_TE.topk(k, dim=-1).indices
    if noise.warm and early:
        coldest = losses.load(index_TK, num_experts).argmin()
        forced_T = torch.rand(num_tokens, device=z_TE.device) < noise.warm
        forced_T &= (index_TK != coldest).all(-1)
        index_TK[forced_T, -1] = coldest
    if noise.capacity:
        capacity = max(1, int(noise.capacity * num_tokens * k / num_experts))
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
    chosen_TE = _most_confident(score_TE, chosen_TE, capacity)
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


def _most_confident(score_TE: Tensor, chosen_TE: Tensor, capacity: int) -> Tensor:
    """The `capacity` choices of each expert that score highest."""
    rank_TE = score_TE.masked_fill(~chosen_TE, -torch.inf).argsort(0, descending=True).argsort(0)
    return chosen_TE & (rank_TE < capacity)
