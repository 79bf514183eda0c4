"""AdamW with a learning rate per part, also for weights in bfloat16 or float16."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefy.finetune.router_hooks import BIASES, moe_layers
from moefy.models.targets.target import ROUTER_SCALE

PARTS = ("router", "experts", "rest")
"""The parts of a model: the routers, all FFNs, everything else."""

LORA = "lora_"
NUMBER = re.compile(r"\.\d+(?=\.)")
"""In the names of weights: of adapters, and of one layer or expert."""


def parts(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part, by name.

    The shared expert's gate, a selection bias and shadows are in no part. The gate must stay at
    one, the balancing moves the bias, and shadows are copies.
    """
    blocks = moe_layers(model)
    routers = {id(parameter) for layer in blocks for parameter, _ in layer.learned}
    fixed = {
        id(parameter)
        for layer in blocks
        for name, parameter in layer.block.named_parameters()
        if name.startswith(("shared_expert_gate", "experts.shadow_")) or name.endswith(BIASES)
    }
    inside = {id(p) for layer in blocks for p in layer.block.parameters()}
    result: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        if id(parameter) in fixed:
            continue
        ffn = id(parameter) in inside or ".mlp." in name or ".feed_forward." in name
        part = "router" if id(parameter) in routers else "experts" if ffn else "rest"
        result[part][name] = parameter
    return result


RATES = {"router": 2.5e-4, "experts": 1e-4, "rest": 5e-5}
USUAL_RMS = 0.19
"""Learning rates by part of matrices whose root mean square is this, as in SmolLM2-135M. Adam's
steps do not shrink with the weights: those of most models are a tenth as large, and would be lost
in as many steps. Twice these rates are best for SmolLM2 and too much for Qwen2.5-Coder-0.5B
(recipes/results/finetune.md)."""


def learning_rates(
    model: nn.Module,
    train: str,
    given: Mapping[str, float | None],
    router_scale: float = ROUTER_SCALE,
    factor: float = 1.0,
) -> dict[str, float]:
    """The learning rate of each kind of weights that is trained: by name, without the numbers.

    A part that is `given` none has the rate of `RATES` times `factor`, and a matrix of it in
    proportion to its size: the median root mean square of its kind over `USUAL_RMS`, which is the
    relative step of Adafactor. Vectors (norms, biases) and the matrices of LoRA, half of which
    begin at zero, have it as it is. Most of a router is written scaled by `router_scale`, and so is
    its rate.

    Source: Shazeer and Stern, 2018, arXiv:1804.04235, section 8.
    """
    small = {id(p) for layer in moe_layers(model) for p, is_small in layer.learned if is_small}
    result = {}
    for kind, (part, weights) in _kinds(model, train).items():
        scale = router_scale if id(weights[0]) in small else 1.0
        rate = given[part]
        if rate is None:
            rate = RATES[part] * factor
            sizes = [rms for weight in weights if (rms := _rms(weight))]
            if weights[0].ndim > 1 and LORA not in kind and sizes:
                rate *= statistics.median(sizes) / scale / USUAL_RMS
        result[kind] = rate * scale
    return result


def groups(model: nn.Module, train: str, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups for what is to be trained, by kind; freezes all else."""
    model.requires_grad_(False)
    result = []
    for kind, (part, weights) in _kinds(model, train).items():
        for weight in weights:
            weight.requires_grad_(True)
        own = {"lr": rates[kind], "part": part}
        result += [{"params": group, **own} for group in _by_mesh(weights)]
    return result


def _kinds(model: nn.Module, train: str) -> dict[str, tuple[str, list[nn.Parameter]]]:
    """The part and the weights of each kind that is trained."""
    names = {"all": PARTS, "lora": ("router", "experts")}.get(train, train.split("+"))
    by_part = parts(model)
    if train == "lora":
        by_part["experts"] = {n: p for n, p in model.named_parameters() if LORA in n}
    result: dict[str, tuple[str, list[nn.Parameter]]] = {}
    for part in names:
        for name, parameter in by_part[part].items():
            result.setdefault(NUMBER.sub("", name), (part, []))[1].append(parameter)
    return result


@torch.no_grad()
def _rms(weight: nn.Parameter) -> float:
    """The root mean square of a weight, also of one that lies in parts."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.float32)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return float(norm) / weight.numel() ** 0.5


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in groups of one device mesh: a fused step takes no others together."""
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(by_mesh.values())


class _OnCopies:
    """An AdamW on float32 copies of low-precision weights; the weights are the copies, rounded.

    In bfloat16 itself most steps would be lost: it has 8 bits, and a step is often smaller than the
    last of them. The copies are part of `state_tensors`.

    Float32 weights under bfloat16 autocast learn as well: in 30 steps of SmolLM2-135M the losses
    differ by 0.01 on average, with 1.45 s a step instead of 1.55 and 3.5 GB instead of 4.4. But
    they double the memory of weights that are not trained (`router`, `lora`), and float16 would
    need scaled losses.
    """

    def __init__(self, params: list[dict[str, Any]], **options: Any) -> None:
        copies = [{**group, "params": [_copy(p) for p in group["params"]]} for group in params]
        self.pairs_of_groups = [
            [*zip(group["params"], copied["params"], strict=True)]
            for group, copied in zip(params, copies, strict=True)
        ]
        super().__init__(copies, **options)  # pyright: ignore[reportCallIssue]

    @property
    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The weights, each with its copy."""
        return [pair for pairs in self.pairs_of_groups for pair in pairs]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step the copies, then round them into the weights.

        One group at a time: what has no gradient stays, and gradients of all in float32 would take
        4 bytes more of every weight.
        """
        for pairs in self.pairs_of_groups:
            for weight, copy in pairs:
                copy.grad = None if weight.grad is None else weight.grad.to(copy.dtype)
            super().step(closure)  # pyright: ignore[reportAttributeAccessIssue]
            for weight, copy in pairs:
                copy.grad = None
                weight.copy_(copy)


class MasterAdamW(_OnCopies, torch.optim.AdamW):  # pyright: ignore[reportIncompatibleMethodOverride]
    """AdamW on float32 copies of weights in bfloat16 or float16."""


def adamw(parameters: list[dict[str, Any]], name: str, **options: Any) -> torch.optim.Optimizer:
    """The AdamW of that name: `adamw`, or `adamw-8bit` with moments in 8 bits.

    Weights that are not float32 get copies in float32 either way.

    Source: Dettmers et al., 2022, arXiv:2110.02861, as torchao has it: tensors of fewer than 4,096
    weights keep their moments in float32.
    """
    whole = all(p.dtype == torch.float32 for group in parameters for p in group["params"])
    if name == "adamw":
        return (torch.optim.AdamW if whole else MasterAdamW)(parameters, fused=True, **options)
    from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

    on_copies = type("MasterAdamW8bit", (_OnCopies, AdamW8bit), {})
    return (AdamW8bit if whole else on_copies)(parameters, **options)


def _copy(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().to(torch.float32, copy=True))


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's tensors, named by the weights: its state, and the float32 copies.

    They do not depend on its groups, which differ with the number of processes. Before the first
    step they are zeros.
    """
    copies = {id(weight): copy for weight, copy in getattr(optimizer, "pairs", ())}
    steered = {id(p) for group in optimizer.param_groups for p in group["params"]}
    result: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        copy = copies.get(id(weight), weight)
        if id(copy) not in steered:
            continue
        for key, tensor in _state(optimizer, copy).items():
            if hasattr(tensor, "codes"):  # of 8 bits; what they stand for is a constant
                result[f"{key}.codes.{name}"] = tensor.codes
                result[f"{key}.scale.{name}"] = tensor.scale
            else:
                result[f"{key}.{name}"] = tensor
        if copy is not weight:
            result[f"copy.{name}"] = copy.detach()
    return result


def _state(optimizer: torch.optim.Optimizer, copy: Tensor) -> dict[str, Any]:
    """What the optimizer holds of a weight; zeros before the first step, as it makes them then."""
    state = optimizer.state[copy]
    if state:
        return state
    eight_bits = getattr(optimizer, "_new_buffer", None)
    state["step"] = torch.zeros((), device=None if eight_bits else copy.device)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        state[key] = eight_bits(copy, signed) if eight_bits else torch.zeros_like(copy.detach())
    return state


@torch.no_grad()
def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round the weights to a dtype, but store them in their own."""
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.copy_(parameter.to(dtype))
