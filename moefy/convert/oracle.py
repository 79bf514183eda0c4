"""Put routers that look at activations into a stock MoE model that is loaded: for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moefy.models.routing import moe_blocks


class NeuronGate(nn.Module):
    """Stands where a stock router stands, but chooses by what the experts' own neurons answer."""

    def __init__(self, router: Any, experts: Any, norm_EN: Tensor) -> None:
        super().__init__()
        # In lists, so that they are not registered a second time.
        self.router, self.experts = [router], [experts]
        self.norms = list(norm_EN)

    def forward(self, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits (weighted squares), weights and indices, as the stock routers give them."""
        experts, hidden = self.experts[0], hidden.reshape(-1, hidden.shape[-1])
        scores = []
        for number, norm_N in enumerate(self.norms):
            if hasattr(experts, "activations"):  # moefy's own class, whose experts may have no gate
                h_TN = experts.activations(number, hidden)
            else:
                both = nn.functional.linear(hidden, experts.gate_up_proj[number])
                gate, up = both.chunk(2, dim=-1)
                h_TN = experts.act_fn(gate) * up
            scores.append(h_TN.float().square() @ norm_N.to(h_TN.device))
        score_TE = torch.stack(scores, 1)
        # What the stock router gives experts between which it has no preference.
        weight_1K = self.router[0](torch.zeros_like(hidden[:1]), *rest)[1]
        index_TK = score_TE.topk(weight_1K.shape[1], dim=1).indices
        weight_TK = weight_1K[:, :1].expand_as(index_TK).contiguous()
        return score_TE.to(hidden.dtype), weight_TK, index_TK


def attach(model: Any, norms: dict[int, Tensor]) -> Any:
    """Replace the routers of a loaded model; `norms[l]` is `Router.norm_EN` of layer l.

    The model may be the first layers of the one that the norms are of.
    """
    for block, layer in zip(moe_blocks(model), sorted(norms), strict=False):
        name = "gate" if hasattr(block.module, "gate") else "router"
        setattr(block.module, name, NeuronGate(block.router, block.experts, norms[layer]))
    return model
