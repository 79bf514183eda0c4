"""How a router's choices are disturbed in training, and what that leaves of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.finetune import losses


@dataclass(frozen=True)
class Explore:
    """How choices are disturbed in training only. All off by default."""

    noise: float = 0.0
    """Standard deviation added to the logits, annealed to zero at `until`."""
    dropout: float = 0.0
    """Chance of an expert to be out of reach for a batch."""
    capacity: float = 0.0
    """Tokens an expert takes, as a multiple of its fair share; the least confident ones go to their
    next best expert, or if that is full as well to none but the shared one. 0 for no end."""
    warm: float = 0.0
    """Share of the tokens whose last choice is the coldest expert instead, up to `until`."""
    until: float = 0.5
    """Share of the training at which noise and warm start have ended."""

    def active(self, progress: float) -> bool:
        """Whether anything disturbs a choice at that share of the training."""
        early = progress < self.until and (self.noise or self.warm)
        return bool(early or self.dropout or self.capacity)


def disturbed(explore: Explore, progress: float, z_TE: Tensor, k: int) -> Tensor:
    """Indices of the chosen experts under `explore`, (T, K); -1 where there is no room for any."""
    num_tokens, num_experts = z_TE.shape
    early = 1 - progress / explore.until if progress < explore.until else 0.0
    score_TE = z_TE + torch.randn_like(z_TE) * (explore.noise * early)
    if explore.dropout:
        out_E = torch.rand(num_experts, device=z_TE.device) < explore.dropout
        out_E[torch.randperm(num_experts, device=z_TE.device)[:k]] = False  # enough to choose from
        score_TE = score_TE.masked_fill(out_E, -torch.inf)
    index_TK = score_TE.topk(k, dim=-1).indices
    if explore.warm and early:
        coldest = losses.load(index_TK, num_experts).argmin()
        forced_T = torch.rand(num_tokens, device=z_TE.device) < explore.warm
        forced_T &= (index_TK != coldest).all(-1)
        index_TK[forced_T, -1] = coldest
    if explore.capacity:
        room = max(1, int(explore.capacity * num_tokens * k / num_experts))
        index_TK = within(score_TE, index_TK, room)
    return index_TK


def within(score_TE: Tensor, index_TK: Tensor, room: int) -> Tensor:
    """The choices, such that no expert has more than `room` tokens; -1 for a choice dropped.

    Each expert keeps the tokens that score highest. The others choose once more, of the experts
    that were not full; who comes too late for that is dropped.
    """
    num_experts, k = score_TE.shape[1], index_TK.shape[1]
    chosen_TE = torch.zeros_like(score_TE, dtype=torch.bool).scatter(1, index_TK, True)
    full_E = chosen_TE.sum(0) >= room
    chosen_TE = _most_confident(score_TE, chosen_TE, room)
    left_T = k - chosen_TE.sum(-1)
    other_TE = score_TE.masked_fill(chosen_TE | full_E, -torch.inf)
    rank_TE = other_TE.argsort(-1, descending=True).argsort(-1)
    more_TE = (rank_TE < left_T[:, None]) & other_TE.isfinite()
    taken_E = chosen_TE.sum(0)
    for expert in range(num_experts):
        late = more_TE[:, expert].cumsum(0) > room - taken_E[expert]
        more_TE[late, expert] = False
    chosen_TE |= more_TE
    place_TK = chosen_TE.float().topk(k, dim=-1)
    return torch.where(place_TK.values > 0, place_TK.indices, -1)


def _most_confident(score_TE: Tensor, chosen_TE: Tensor, room: int) -> Tensor:
    """The `room` choices of each expert that score highest."""
    rank_TE = score_TE.masked_fill(~chosen_TE, -torch.inf).argsort(0, descending=True).argsort(0)
    return chosen_TE & (rank_TE < room)
