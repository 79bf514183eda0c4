"""Push calibration states through a dense model layer by layer, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from moefy.checkpoint.model_config import model_config
from moefy.checkpoint.tensors import Checkpoint
from moefy.errors import MoefyError
from moefy.files.buffers import MEMORY, Store
from moefy.models.families.family import Family
from moefy.models.load import open_model, some_layers, states_of
from moefy.types import FFN

Join = Callable[[Tensor], Tensor] | None
"""What a layer does to the FFN's output before it is added; None: nothing."""

Leave = Callable[[Tensor], Tensor] | None
"""What a layer does to the sum; None: nothing."""


@dataclass(frozen=True)
class Passage:
    """One layer of the dense model, but for its FFN."""

    run: Callable[[Tensor, Tensor], None]
    """Overwrites states that enter the layer, (B, T, D), with those that leave it less the FFN's
    part, which the caller adds, and writes the FFN's inputs to the second tensor of that shape."""
    join: Join
    leave: Leave
    device: torch.device


BATCH = 4  # sequences that go through a layer at a time


class _Tap(nn.Module):
    """Stands where the FFN stands: keeps its input and adds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return torch.zeros_like(x)


class _Skip(nn.Module):
    """Stands where embeddings, which are done, and norms of what leaves stand."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        states = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 2)
        return next(states, torch.zeros(()))  # nothing to add, made of ids or positions


def embed(checkpoint: Checkpoint, family: Family, ids_BT: Tensor, device: torch.device) -> Tensor:
    """What enters the first layer for the token ids, float32, shape (B, T, D).

    Raises:
        MoefyError: code 2, for sequences that are longer than the learned positions.
    """
    positions_TD, length = None, ids_BT.shape[1]
    if family.positions:
        table_PD = checkpoint.tensor(family.positions)[family.first_position :]
        if length > len(table_PD):
            raise MoefyError(
                f"sequences of {length} tokens, but the model has positions for {len(table_PD)}; "
                "lower --sequence-length",
                code=2,
            )
        positions_TD = table_PD[:length]
    if family.embeddings:
        return _embedded(checkpoint, family, ids_BT, device)
    scale = family.embedding_scale(model_config(checkpoint).to_dict())
    states_BTD = checkpoint.rows(family.embedding, ids_BT).to(device)
    if scale != 1.0:
        states_BTD.mul_(scale)
    if family.projection and family.projection in checkpoint.entries:
        states_BTD = states_BTD @ checkpoint.tensor(family.projection).float().to(device).T
    if positions_TD is not None:
        states_BTD += positions_TD.float().to(device)
    return states_BTD


def _embedded(
    checkpoint: Checkpoint, family: Family, ids_BT: Tensor, device: torch.device
) -> Tensor:
    """What the embeddings of transformers give for the token ids."""
    config, home = model_config(checkpoint), str(family.embeddings)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config)
    module: Any = model.get_submodule(home.removeprefix(model.base_model_prefix + "."))
    embeddings = type(module)(config)  # with the buffers that are stored nowhere
    weights = {
        name: checkpoint.tensor(f"{home}.{name}").float() for name in embeddings.state_dict()
    }
    embeddings.load_state_dict(weights, assign=True)
    embeddings.to(device).eval().requires_grad_(False)
    return torch.cat([embeddings(ids_BT.to(device)) for ids_BT in ids_BT.split(32)])


def read_ffn(checkpoint: Checkpoint, family: Family, layer: int, device: torch.device) -> FFN:
    """The FFN of one layer in float32."""
    activation = getattr(model_config(checkpoint), family.activation, "silu")
    stored = [checkpoint.tensor(name).to(device).float() for name in family.ffn_names(layer)]
    return family.read(stored, activation)


def passage(
    checkpoint: Checkpoint,
    family: Family,
    layer: int,
    device: torch.device,
    *,
    batch: int = BATCH,
    store: Store = MEMORY,
) -> Passage:
    """Everything of one layer but its FFN, on the device; states may lie elsewhere, in `store`.

    A bias behind the FFN is added to the states. The layer is transformers' own, run inside its
    own model class, so masks and rotary embeddings are the family's.
    """
    model, block, seen, leave = _one_layer(checkpoint, family, layer, device)
    through = model.encoder if model.config.is_encoder_decoder else model
    bias_D: Any = 0
    if family.down_bias:
        name = family.layer.format(layer=layer) + family.down_bias
        bias_D = checkpoint.tensor(name).float().to(device)
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    # Some classes scale what they take as embeddings, which these states are not.
    block.register_forward_pre_hook(
        lambda module, args, kwargs: ((entering[0], *args[1:]), kwargs), with_kwargs=True
    )
    block.register_forward_hook(lambda module, args, out: leaving.append(states_of(out)))

    @torch.inference_mode()
    def run(states_BTD: Tensor, x_BTD: Tensor) -> None:
        def step(first: int, last: int) -> None:
            part = states_BTD[first:last].to(device)
            entering[:], leaving[:] = [part], []
            through(inputs_embeds=part, use_cache=False)
            x_BTD[first:last] = seen.seen.view(part.shape)
            states_BTD[first:last] = leaving[0] + bias_D if family.down_bias else leaving[0]

        for first in range(0, len(states_BTD), batch):
            _halving(step, first, min(first + batch, len(states_BTD)))
            store.release()

    return Passage(run, family.join(block) if family.join else None, leave, device)


def tap(
    checkpoint: Checkpoint, family: Family, layer: int, states_BTD: Tensor, *, batch: int = BATCH
) -> tuple[Tensor, Join, Leave]:
    """Run states past one layer but for its FFN, in place (see `Passage`); give the FFN's inputs,
    (B * T, D), what its outputs go through before they are added, and what the sum goes through."""
    x_BTD = torch.empty_like(states_BTD)
    layer_but_ffn = passage(checkpoint, family, layer, states_BTD.device, batch=batch)
    layer_but_ffn.run(states_BTD, x_BTD)
    return x_BTD.view(-1, x_BTD.shape[-1]), layer_but_ffn.join, layer_but_ffn.leave


def _halving(step: Callable[[int, int], None], first: int, last: int) -> None:
    """Do a step for a range of sequences, or for halves of it where a GPU has no room for all."""
    try:
        step(first, last)
        return
    except torch.OutOfMemoryError:
        if last - first == 1:
            raise
    middle = (first + last) // 2
    _halving(step, first, middle)
    _halving(step, middle, last)


def ending(checkpoint: Checkpoint, family: Family) -> Callable[[Tensor], Tensor]:
    """A function from states that leave the last layer, (T, D), to the logits, (T, V).

    Norm and head are those of transformers' own class, of which one layer is loaded.
    """
    config = some_layers(model_config(checkpoint), [0])
    model, _ = open_model(checkpoint.folder, config=config, dtype="auto")
    model.eval()
    entering: list[Tensor] = []
    block: Any = model.get_submodule(family.layer.format(layer=0).rstrip("."))
    block.register_forward_hook(lambda module, args, out: entering[0])

    @torch.inference_mode()
    def logits(states_TD: Tensor) -> Tensor:
        entering[:] = [states_TD[None].to(model.dtype).cpu()]
        # The hook replaces what these ids give.
        ids_1T = torch.zeros(entering[0].shape[:2], dtype=torch.long)
        return model(ids_1T, use_cache=False).logits[0]

    return logits


def _one_layer(
    checkpoint: Checkpoint, family: Family, layer: int, device: torch.device
) -> tuple[Any, Any, _Tap, Leave]:
    """A base model that holds only `layer`, that layer, the tap in place of its FFN, and what the
    layer does to the sum."""
    single = some_layers(model_config(checkpoint), [layer])
    with torch.device("meta"):
        model: Any = AutoModel.from_config(single, dtype=torch.float32)
    seen = _Tap()
    home = family.layer.format(layer=0).removeprefix(model.base_model_prefix + ".").rstrip(".")
    block: Any = model
    for part in home.split("."):
        for name in [name for name, _ in block.named_children() if name != part]:
            if name == "rotary_emb":
                block.rotary_emb = type(block.rotary_emb)(config=single).to(device)
            else:
                setattr(block, name, _Skip())
        block = block.get_submodule(part)
    block.set_submodule(family.block, seen)
    for name in family.emptied:
        block.set_submodule(name, nn.Identity())
    own, first = (family.layer.format(layer=number) for number in (layer, 0))
    weights = {}
    for name in block.state_dict():
        # T5's first layer holds the distances' biases of all.
        prefix = own if own + name in checkpoint.entries else first
        weights[name] = checkpoint.tensor(prefix + name).to(device).float()
    block.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    leave: Leave = None
    if family.behind:
        leave = block.get_submodule(family.behind)
        block.set_submodule(family.behind, _Skip())
    return model, block, seen, leave
