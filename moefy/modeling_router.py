"""The router of moefy's own class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Linear scores; the highest are chosen, and every chosen expert counts fully.

    With `norm_topk_prob` each counts by its softmax weight among those that are chosen.
    An expert that is `lost` is chosen last, and then counts nothing.
    There may be terms that add to them: of two layers with tanh between them, and of positions.
    Those behind the last one with a row of its own take that row.
    """

    def __init__(self, config: Any, hidden: int) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        num, units, positions = config.num_experts, config.router_units, config.router_positions
        self.weight = nn.Parameter(torch.empty(num, hidden))
        self.hidden = nn.Parameter(torch.empty(units, hidden)) if units else None
        self.output = nn.Parameter(torch.empty(num, units)) if units else None
        self.position = nn.Parameter(torch.empty(positions, num)) if positions else None
        self.lost: frozenset[int] = frozenset()

    def forward(
        self, x_TD: Tensor, position_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, gates and indices of the chosen experts."""
        dtype, x_TD = x_TD.dtype, x_TD.float()
        score_TE = nn.functional.linear(x_TD, self.weight.float())
        if self.hidden is not None and self.output is not None:
            unit_TH = (x_TD @ self.hidden.float().T).tanh()
            score_TE = score_TE + nn.functional.linear(unit_TH, self.output.float())
        if self.position is not None and position_BT is not None:
            row_T = position_BT.clamp(max=len(self.position) - 1).flatten()
            score_TE = score_TE + self.position.float()[row_T].repeat(len(x_TD) // len(row_T), 1)
        if self.lost:
            lost = torch.tensor([*self.lost], device=score_TE.device)
            score_TE = score_TE.index_fill(1, lost, -torch.inf)
        share_TE = score_TE.softmax(-1)
        index_TK = score_TE.topk(self.top_k, dim=-1).indices
        share_TK = share_TE.gather(1, index_TK)
        if self.norm_topk_prob:
            gate_TK = share_TK / share_TK.sum(-1, keepdim=True)
        else:
            gate_TK = 1 + share_TK - share_TK.detach()  # one, with the gradient of the share
        if self.lost:
            gate_TK = gate_TK.masked_fill(score_TE.gather(1, index_TK) == -torch.inf, 0)
        return score_TE, gate_TK.to(dtype), index_TK


def see_places(block: Any, layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Tell a block where its tokens stand; a layer that is not told has the whole text."""
    position_BT = kwargs.get("position_ids")
    if position_BT is None:
        position_BT = torch.arange(args[0].shape[1], device=args[0].device)[None]
    block.position_BT = position_BT
