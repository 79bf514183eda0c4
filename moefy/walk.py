"""Push calibration states through a dense model layer by layer, one layer in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig

from moefy.checkpoint import Checkpoint
from moefy.families.family import Family
from moefy.layout import FFN

Join = Callable[[Tensor], Tensor] | None
"""What a layer does to the FFN's output before it is added; None: nothing."""


class _Tap(nn.Module):
    """Stands where the FFN stands: keeps what it is given and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return torch.zeros_like(x)


class _Skip(nn.Module):
    """Stands where embeddings, which are done, and the final norm stand."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_floating_point() else torch.zeros(())


def model_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The transformers configuration of a checkpoint, with its defaults filled in."""
    config: dict[str, Any] = {key: _number(value) for key, value in checkpoint.config.items()}
    return AutoConfig.for_model(config.pop("model_type"), **config)


def _number(value: Any) -> Any:
    """`value` with what transformers writes for infinity and NaN read as a number."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_number(item) for item in value] if isinstance(value, list) else value


def embed(checkpoint: Checkpoint, family: Family, ids_BT: Tensor, device: torch.device) -> Tensor:
    """What enters the first layer for the token ids, float32, shape (B, T, D)."""
    scale = family.embedding_scale(model_config(checkpoint).to_dict())
    states_BTD = checkpoint.rows(family.embedding, ids_BT).to(device)
    if scale != 1.0:
        states_BTD.mul_(scale)
    if family.positions:
        states_BTD += checkpoint.tensor(family.positions)[: ids_BT.shape[1]].float().to(device)
    return states_BTD


def read_ffn(
    checkpoint: Checkpoint, family: Family, layer: int, activation: str, device: torch.device
) -> FFN:
    """The FFN of one layer in float32."""
    stored = [checkpoint.tensor(name).float().to(device) for name in family.ffn_names(layer)]
    return family.read(stored, activation)


def tap(
    checkpoint: Checkpoint,
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    states_BTD: Tensor,
    *,
    batch: int = 4,
) -> tuple[Tensor, Join]:
    """Run everything of one layer but its FFN; return the FFN's inputs, shape (B * T, D), and what
    the FFN's outputs go through before they are added.

    `states_BTD` holds the states that enter the layer and is overwritten with those that leave it
    less the FFN's part, which the caller adds; a bias behind the FFN is in them. The layer is
    transformers' own, run inside its own model class, so masks and rotary embeddings are the
    family's.
    """
    model, block, seen = _one_layer(checkpoint, family, config, layer, states_BTD.device)
    x_BTD = torch.empty_like(states_BTD)
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    # Some classes scale what they are given as embeddings, which these states are not.
    block.register_forward_pre_hook(
        lambda module, args, kwargs: ((entering[0], *args[1:]), kwargs), with_kwargs=True
    )
    block.register_forward_hook(lambda module, args, out: leaving.append(out))
    with torch.inference_mode():
        for first in range(0, len(states_BTD), batch):
            part = states_BTD[first : first + batch]
            entering[:], leaving[:] = [part], []
            model(inputs_embeds=part, use_cache=False)
            part.copy_(leaving[0])
            x_BTD[first : first + batch] = seen.seen
    if family.down_bias:
        name = family.layer.format(layer=layer) + family.down_bias
        states_BTD += checkpoint.tensor(name).float().to(states_BTD.device)
    return x_BTD.view(-1, x_BTD.shape[-1]), family.join(block) if family.join else None


def ending(
    checkpoint: Checkpoint, family: Family, config: PreTrainedConfig
) -> Callable[[Tensor], Tensor]:
    """A function from states that leave the last layer, (T, D), to the logits, (T, V).

    Norm and head are those of transformers' own class, of which one layer is loaded.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder,
        config=some_layers(config, 0, 1),
        dtype="auto",
        local_files_only=True,
    ).eval()
    given: list[Tensor] = []
    block: Any = model.get_submodule(family.layer.format(layer=0).rstrip("."))
    block.register_forward_hook(lambda module, args, out: given[0])

    @torch.inference_mode()
    def logits(states_TD: Tensor) -> Tensor:
        given[:] = [states_TD[None].to(model.dtype).cpu()]
        # The embeddings go unread.
        return model(inputs_embeds=given[0], use_cache=False).logits[0]

    return logits


def some_layers(config: PreTrainedConfig, first: int, last: int) -> PreTrainedConfig:
    """The configuration of a model of only the layers from `first` to before `last`."""
    fewer = copy.deepcopy(config)
    num_layers = config.num_hidden_layers
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == num_layers and not key.endswith("_token_id"):
            setattr(fewer, key, value[first:last])
    fewer.num_hidden_layers = last - first
    return fewer


def _one_layer(
    checkpoint: Checkpoint,
    family: Family,
    config: PreTrainedConfig,
    layer: int,
    device: torch.device,
) -> tuple[Any, Any, _Tap]:
    """A base model holding only `layer`, that layer, and the tap in place of its FFN."""
    single = some_layers(config, layer, layer + 1)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(single, dtype=torch.float32)
    seen = _Tap()
    home = family.layer.format(layer=0).removeprefix(model.base_model_prefix + ".").rstrip(".")
    block: Any = model.get_submodule(home)
    block.set_submodule(family.block, seen)
    for name in [name for name, _ in model.named_children()]:
        if name == "rotary_emb":
            model.rotary_emb = type(model.rotary_emb)(config=single).to(device)
        elif name != home.split(".")[0]:
            setattr(model, name, _Skip())
    prefix = family.layer.format(layer=layer)
    weights = {
        name: checkpoint.tensor(prefix + name).float().to(device) for name in block.state_dict()
    }
    block.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), block, seen
