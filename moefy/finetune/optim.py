"""AdamW with learning rates by part, for weights of less precision than a step needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moefy.finetune.routing import BIASES, layers
from moefy.models.targets.target import ROUTER_SCALE

PARTS = ("router", "experts", "rest")
"""What parameters are told apart by: the routers' rows, all FFNs, everything else."""


def parts(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part, by name.

    The shared expert's gate and a selection bias are in none: they hold the written gates at one,
    and the choices at what the balancing makes them.
    """
    blocks = layers(model)
    rows = {id(layer.rows) for layer in blocks}
    fixed = {id(p) for layer in blocks for p in _fixed(layer.block)}
    inside = {id(p) for layer in blocks for p in layer.block.parameters()}
    found: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) in fixed:
            continue
        ffn = id(parameter) in inside or ".mlp." in name or ".feed_forward." in name
        part = "router" if id(parameter) in rows else "experts" if ffn else "rest"
        found[part][name] = parameter
    return found


def _fixed(block: nn.Module) -> Iterable[nn.Parameter]:
    for name, parameter in block.named_parameters():
        if name.startswith("shared_expert_gate") or name.endswith(BIASES):
            yield parameter


def groups(model: nn.Module, train: str, rates: dict[str, float]) -> list[dict[str, Any]]:
    """Parameter groups for what is to be trained; freezes all else.

    The router's rows are written `ROUTER_SCALE` as large as they are meant: so is their rate.
    """
    chosen = {"all": PARTS, "lora": ("router", "experts")}.get(train, train.split("+"))
    found = parts(model)
    if train == "lora":
        found["experts"] = {n: p for n, p in model.named_parameters() if "lora_" in n}
    model.requires_grad_(False)
    made = []
    for part in chosen:
        if not found[part]:
            continue
        scale = ROUTER_SCALE if part == "router" else 1.0
        for parameter in found[part].values():
            parameter.requires_grad_(True)
        rate = {"lr": rates[part] * scale, "part": part}
        made += [{"params": group, **rate} for group in _by_mesh(found[part].values())]
    return made


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that share a mesh of processes, if any: one fused step takes no others."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(by_mesh.values())


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of weights that are of another dtype; the weights follow rounded.

    In bfloat16 itself most steps would be lost: it has 8 bits, and a step is often smaller than the
    last of them. The copies are part of `state_dict`.
    """

    def __init__(self, params: list[dict[str, Any]], **options: Any) -> None:
        self.weights: list[list[nn.Parameter]] = [list(group["params"]) for group in params]
        copies = [{**group, "params": [_copy(p) for p in group["params"]]} for group in params]
        super().__init__(copies, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of all copies, and of the weights after them."""
        for weights, group in zip(self.weights, self.param_groups, strict=True):
            for weight, copy in zip(weights, group["params"], strict=True):
                copy.grad = None if weight.grad is None else weight.grad.to(copy.dtype)
        super().step(closure)
        for weights, group in zip(self.weights, self.param_groups, strict=True):
            for weight, copy in zip(weights, group["params"], strict=True):
                copy.grad = None
                weight.copy_(copy)

    def state_dict(self) -> dict[str, Any]:
        """As AdamW's, with the copies under `copies`."""
        copies = [[p.detach() for p in group["params"]] for group in self.param_groups]
        return {**super().state_dict(), "copies": copies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        state = dict(state_dict)
        for kept, group in zip(state.pop("copies"), self.param_groups, strict=True):
            for source, copy in zip(kept, group["params"], strict=True):
                copy.data.copy_(source)
        super().load_state_dict(state)


def _copy(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.float32, copy=True))


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round the weights to a dtype, in their own."""
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.copy_(parameter.to(dtype))
