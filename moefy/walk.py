"""Push calibration states through a dense model layer by layer, one layer in memory at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from moefy.checkpoint import Checkpoint
from moefy.families.family import Family
from moefy.layout import FFN


class _Tap(nn.Module):
    """Stands where the FFN stands: keeps what it is given and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return torch.zeros_like(x)


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers configuration of a checkpoint, with its defaults filled in."""
    config: dict[str, Any] = {key: value for key, value in checkpoint.config.items()}
    return AutoConfig.for_model(config.pop("model_type"), **config)


def embed(checkpoint: Checkpoint, family: Family, ids_BT: Tensor, device: torch.device) -> Tensor:
    """Embeddings of the token ids, float32, shape (B, T, D)."""
    return checkpoint.rows(family.embedding, ids_BT).to(device)


def read_ffn(
    checkpoint: Checkpoint, family: Family, layer: int, activation: str, device: torch.device
) -> FFN:
    """The FFN of one layer in float32."""
    matrices = [checkpoint.tensor(name).float().to(device) for name in family.ffn_names(layer)]
    return FFN(*matrices, activation=activation)


def tap(
    checkpoint: Checkpoint,
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    states_BTD: Tensor,
    *,
    batch: int = 4,
) -> Tensor:
    """Run everything of one layer but its FFN; return the FFN's inputs, shape (B * T, D).

    `states_BTD` holds the states that enter the layer and is overwritten with those that leave it
    less the FFN's output, which the caller adds. The layer is transformers' own, run inside its
    own model class, so masks and rotary embeddings are the family's.
    """
    model, seen = _one_layer(checkpoint, family, config, layer, states_BTD.device)
    x_BTD = torch.empty_like(states_BTD)
    with torch.inference_mode():
        for first in range(0, len(states_BTD), batch):
            part = states_BTD[first : first + batch]
            out = model(inputs_embeds=part, use_cache=False).last_hidden_state
            part.copy_(out)
            x_BTD[first : first + batch] = seen.seen
    return x_BTD.view(-1, x_BTD.shape[-1])


def one_layer_config(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """The configuration of a model whose only layer is `layer`."""
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        single.layer_types = [config.layer_types[layer]]
    return single


def _one_layer(
    checkpoint: Checkpoint,
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    device: torch.device,
) -> tuple[nn.Module, _Tap]:
    """A base model holding only `layer`, with a tap for its FFN and no final norm."""
    single = one_layer_config(config, layer)
    with torch.device("meta"):
        model = AutoModel.from_config(single, dtype=torch.float32)
    seen = _Tap()
    model.layers[0].mlp = seen
    model.norm = nn.Identity()
    model.rotary_emb = type(model.rotary_emb)(config=single).to(device)
    prefix = family.layer.format(layer=layer)
    weights = {
        name: checkpoint.tensor(prefix + name).float().to(device)
        for name in model.layers[0].state_dict()
    }
    model.layers[0].load_state_dict(weights, assign=True)
    return model.eval(), seen
