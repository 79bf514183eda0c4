"""A loaded MoE model of any class with one expert out, run on text again and again."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moefy.evaluate.metrics import log_probabilities
from moefy.models.routing import MoEBlock, moe_blocks

Expert = tuple[int, int]
"""The number of a layer, and that of an expert in it."""

TOPK = (torch.topk, Tensor.topk)


@contextlib.contextmanager
def without(block: MoEBlock, expert: int) -> Iterator[None]:
    """Take one expert out while the `with` block runs: its tokens go to the next best one.

    Its logit is minus infinity, and so is its score after a selection bias. A token without another
    expert to go to gets nothing from this one, not even NaN.
    """
    router: Any = block.router
    route = router.forward

    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with _Masked(expert, block.num_experts):
            logits_TE, weight_TK, index_TK = route(*args)
        return logits_TE, weight_TK.masked_fill(index_TK == expert, 0), index_TK

    with _forward(router, forward):
        yield


@contextlib.contextmanager
def by_shadow(block: MoEBlock, expert: int) -> Iterator[None]:
    """Have the shadow of one expert of moefy's own class answer while the `with` block runs."""
    experts, lost = block.experts, block.experts.lost
    experts.lost = lost | {expert}
    try:
        yield
    finally:
        experts.lost = lost


class _Masked(TorchFunctionMode):
    """Sets one column to minus infinity in logits, and in scores where the best are chosen."""

    def __init__(self, expert: int, num_experts: int) -> None:
        super().__init__()
        self.expert, self.num_experts = torch.tensor([expert]), num_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TOPK:
            score_TE, *rest = args
            index_TK = func(self._masked(score_TE), *rest, **kwargs).indices
            # Where all experts are chosen, a value of minus infinity would spoil the sum.
            return torch.return_types.topk((score_TE.gather(-1, index_TK), index_TK))
        result = func(*args, **kwargs)
        return self._masked(result) if func is nn.functional.linear else result

    def _masked(self, score_TE: Tensor) -> Tensor:
        if score_TE.shape[-1] != self.num_experts:
            return score_TE
        return score_TE.index_fill(-1, self.expert.to(score_TE.device), -torch.inf)


def losses(
    model: Any, ids_T: Tensor, experts: Sequence[Expert], *, shadows: bool = False
) -> Iterator[float]:
    """Negative log-likelihood of a text, nats: of the whole model, then without each expert alone.

    With `shadows`, then with the shadow of each in its place. The layers below that of a lost
    expert are not computed again.
    """
    blocks = {block.layer: block for block in moe_blocks(model)}
    states: list[Any] = []
    with contextlib.ExitStack() as stack:
        for layer in _layers(model):
            hook = layer.register_forward_hook(lambda _module, _args, out: states.append(out))
            stack.callback(hook.remove)
        yield _loss(model, ids_T)
    for lose in (without, by_shadow)[: 1 + shadows]:
        for layer, expert in experts:
            with _replayed(model, states[:layer]), lose(blocks[layer], expert):
                yield _loss(model, ids_T)


def _loss(model: Any, ids_T: Tensor) -> float:
    log_p_TV = log_probabilities(model, ids_T)
    return -float(log_p_TV.gather(1, ids_T[1:, None].to(log_p_TV.device)).sum())


def _layers(model: Any) -> nn.ModuleList:
    """The layers of a model that has MoE blocks."""
    path = moe_blocks(model)[0].name.split(".")
    home = itertools.takewhile(lambda part: not part.isdecimal(), path)
    return model.get_submodule(".".join(home))


@contextlib.contextmanager
def _replayed(model: Any, states: Sequence[Any]) -> Iterator[None]:
    """Have the first layers give `states` without computing."""
    with contextlib.ExitStack() as stack:
        for layer, out in zip(_layers(model), states, strict=False):
            stack.enter_context(_forward(layer, functools.partial(_given, out)))
        yield


def _given(out: Any, *_args: Any, **_kwargs: Any) -> Any:
    return out


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Run `forward` in place of that of a module."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
