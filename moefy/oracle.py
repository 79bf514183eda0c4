"""Put the oracle router into a stock MoE model that is already loaded: a ceiling for evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OracleGate(nn.Module):
    """Stands where a softmax router stands, but chooses by the experts' true output energy."""

    def __init__(self, block: Any, norm_EN: Tensor) -> None:
        super().__init__()
        self.experts = [block.experts]  # in a list, so that it is not registered a second time
        self.top_k = block.gate.top_k
        self.weight_of_one = 1 / (self.top_k if block.gate.norm_topk_prob else len(norm_EN))
        self.norms = list(norm_EN)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits (the energies), weights and indices, as the stock routers return them."""
        experts, hidden = self.experts[0], hidden.reshape(-1, hidden.shape[-1])
        energies = []
        for gate_up, norm_N in zip(experts.gate_up_proj, self.norms, strict=True):
            gate, up = nn.functional.linear(hidden, gate_up).chunk(2, dim=-1)
            energies.append((experts.act_fn(gate) * up).float().square() @ norm_N)
        energy_TE = torch.stack(energies, 1)
        index_TK = energy_TE.topk(self.top_k, dim=1).indices
        weight_TK = torch.full_like(index_TK, 1, dtype=hidden.dtype) * self.weight_of_one
        return energy_TE.to(hidden.dtype), weight_TK, index_TK


def attach(model: Any, norms: dict[int, Tensor]) -> Any:
    """Replace the routers of a loaded model; `norms[l]` holds layer l's |down column|^2, (E, N)."""
    for layer, norm_EN in norms.items():
        if layer >= len(model.model.layers):
            continue  # a part of the model was loaded
        block = model.model.layers[layer].mlp
        block.gate = OracleGate(block, norm_EN)
    return model
