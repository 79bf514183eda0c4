"""A last refit of `down_proj`, in closed form, on the trained model.

What leaves a layer has drifted from what leaves it in the dense model, and the refit makes up for a
share of that: ridge regression under the routing as it is, near the trained weights. All layers are
refitted in one pass of the model, and what leaves each changes at once: those above are fitted to
what they will get.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.convert.refit import refit
from moefy.convert.routed_ffn import RoutedFFN
from moefy.files.safetensors_header import read_entries
from moefy.files.shards import read
from moefy.finetune.inputs import Run
from moefy.finetune.layout import Layout
from moefy.finetune.unrefitted import layout_of
from moefy.models import families
from moefy.models.load import states_of
from moefy.models.routing import MoEBlock, moe_blocks
from moefy.types import FFN, Profile, Router

TOKENS = 16384
"""Of the training text that are refitted on."""

HELD_OUT = 8
"""One sequence of so many chooses the strength of the ridge."""

SHARE = 0.5
"""Of the drift that a layer makes up for, as much as in a conversion by default (`drift`)."""


@dataclass(frozen=True)
class Files:
    """A trained model's tensors by their names in files."""

    tensors: Mapping[str, Tensor]
    layout: Layout
    layer: str
    """What stands before the tensors of layer `{layer}`."""
    activation: str
    stored: torch.dtype
    """What they will be rounded to."""

    def prefix(self, layer: int) -> str:
        """What stands before the tensors of a layer."""
        return self.layer.format(layer=layer)

    def ffn(self, layer: int, device: torch.device) -> FFN:
        """The FFN of a layer in float32, in the order of the layout."""
        prefix = self.prefix(layer)
        own = {
            name.removeprefix(prefix): tensor.to(device)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }
        gate_FD, up_FD = (rows.float() for rows in self.layout.read(own))
        down_DF = self.layout.read_down(own)
        return FFN(gate_FD if self.layout.gated else None, up_FD, down_DF, self.activation)

    def written(self, layer: int, ffn: FFN) -> dict[str, Tensor]:
        """The tensors of `down_proj` of a layer, rounded as they are stored."""
        downs = self.layout.write(ffn, self.stored)
        return {self.prefix(layer) + name: tensor for name, tensor in downs.items()}


def state(
    model: Any, run: Run, saved: Path, dense: Any, ids_BT: Tensor, stored: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of the trained model after the refit.

    `saved` holds its weights, and they will be `stored` in that dtype; `dense` is the dense model.
    """
    tensors = {name: read(name, entry) for name, entry in read_entries(saved).items()}
    family = families.load(run.summary["family"])
    activation = getattr(dense.config, family.activation, "silu")
    files = Files(tensors, layout_of(run), run.layer, activation, stored)
    dropped = run.summary.get("dropped_layers", [])
    kept = [n for n in range(dense.config.num_hidden_layers) if n not in dropped]
    layers = {
        block.layer: family.layer.format(layer=kept[block.layer]).rstrip(".")
        for block in moe_blocks(model)
    }
    states = leaving(dense, list(layers.values()), ids_BT)
    new = refitted(model.eval(), files, ids_BT, dict(zip(layers, states, strict=True)))
    return tensors | {name: tensor.to(tensors[name].dtype) for name, tensor in new.items()}


def leaving(model: Any, layers: list[str], ids_BT: Tensor) -> list[Tensor]:
    """What leaves some layers of a model, named by their modules, on the CPU, (T, D) each."""
    states: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, layer: Any, args: Any, out: Any) -> None:
        states[name].append(states_of(out).flatten(0, 1).cpu())

    hooks = [model.get_submodule(n).register_forward_hook(partial(keep, n)) for n in layers]
    with torch.inference_mode():
        for part_BT in ids_BT.split(4):
            model(input_ids=part_BT.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return [torch.cat(states[name]) for name in layers]


def refitted(
    model: Any, files: Files, ids_BT: Tensor, dense: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """The tensors of `down_proj` after the refit, by their names in the files.

    `dense` is what leaves the dense model's layers on the same tokens, by layer of the run. The
    last sequences of `ids_BT` choose the strength.
    """
    length = ids_BT.shape[1]
    num_heldout = len(ids_BT) // HELD_OUT * length
    result, hooks = {}, []
    for block in moe_blocks(model):
        layer: Any = model.get_submodule(files.prefix(block.layer).rstrip("."))
        one = _Layer(files, block, dense[block.layer], num_heldout, result)
        hooks += [
            block.module.register_forward_pre_hook(one.see_inputs),
            block.router.register_forward_hook(one.see_choices),
            layer.register_forward_hook(one.refit),
        ]
    with torch.no_grad():
        model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return result


@dataclass
class _Layer:
    """One layer while the pass goes through it."""

    files: Files
    block: MoEBlock
    dense_TD: Tensor
    num_heldout: int
    result: dict[str, Tensor]
    x_TD: Tensor = field(default_factory=lambda: torch.empty(0))
    index_TK: Tensor = field(default_factory=lambda: torch.empty(0))

    def see_inputs(self, module: Any, args: Any) -> None:
        self.x_TD = args[0].flatten(0, -2).float()

    def see_choices(self, module: Any, args: Any, out: Any) -> None:
        self.index_TK = out[2]

    def refit(self, layer: Any, args: Any, out: Any) -> Any:
        """Refit `down_proj`; give what then leaves the layer."""
        states_BTD, number = states_of(out), self.block.layer
        own_TD = states_BTD.flatten(0, 1).float()
        ffn = self.files.ffn(number, own_TD.device)
        num_experts, k = self.block.num_experts, self.index_TK.shape[1]
        mask_TE = own_TD.new_zeros(len(own_TD), num_experts).scatter_(1, self.index_TK, 1.0)
        # The choices stand for the inputs: this router repeats them.
        router = Router(torch.eye(num_experts, device=own_TD.device))
        routed = RoutedFFN(ffn, self.files.layout.partition, router, k)
        h_TF = ffn.activations(self.x_TD)
        run = routed.run(h_TF, mask_TE)
        scale_T1 = own_TD.norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
        lacking_TD = SHARE * (self.dense_TD.to(own_TD) - own_TD)
        profile = Profile(
            mask_TE,
            (run.outputs(routed.down_AD) + lacking_TD) * scale_T1,
            scale_T1[:, 0],
            self.num_heldout,
            energy_F=h_TF.new_zeros(ffn.num_neurons),
            h_TF=h_TF * scale_T1,
        )
        new = routed.with_down(refit(routed, profile).down_DF)
        self.result |= {n: t.cpu() for n, t in self.files.written(number, new.ffn).items()}
        change_TD = run.outputs(new.down_AD - routed.down_AD)
        states_BTD = (own_TD + change_TD).to(states_BTD.dtype).view_as(states_BTD)
        return (states_BTD, *out[1:]) if isinstance(out, tuple) else states_BTD
