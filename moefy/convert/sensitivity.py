"""Which layers stay dense: one budget of active FFN neurons, spent where it is missed most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from moefy.config.recipe import Recipe
from moefy.convert import forward
from moefy.convert.ffn import Method, convert_block
from moefy.convert.partition import static
from moefy.convert.prepare import Job, prepare
from moefy.convert.profile import Inputs
from moefy.errors import MoefyError
from moefy.models.shape import fine, pruned
from moefy.progress import Watch
from moefy.text.packing import Tokens

PIECE = 128
"""Tokens of a piece of a sequence: short pieces take few tokens from many documents."""

PROBES = 8  # held-out pieces on which the sensitivities are measured
FITTED = 32  # pieces to fit on

GROWTH = 2.0
"""Loss is taken to grow with this power of the share of neurons left out. That of whole models
grows with 1.15, but then 8 layers of SmolLM2-135M stay dense at 0.5 and the others lose more than
these save: dNLL 0.63 on text like the calibration's, against 0.54 with the 2 that a square says."""


def settle(job: Job, loss_L: list[float]) -> Job:
    """Replace `layers = "auto"` by the layers to convert, and `active` by what they then have left.

    `active` counts all layers: those that stay dense take theirs from the others, which get many
    small experts (`shape.fine`) unless the recipe says how many. The most sensitive layers stay
    dense, as many as promise the least loss, or fewer where no class that the recipe admits can
    hold that. `loss_L` is what `sensitivities` gives.
    """
    order = sorted(range(job.num_layers), key=lambda layer: -loss_L[layer])
    # The recipe's fraction is of all layers of the model; none is active in those that are dropped.
    share = job.num_layers / job.source.num_layers
    best = min(range(job.num_layers), key=lambda n: _promised(loss_L, job.active, n))
    for num_dense in range(best, -1, -1):
        dense = sorted(order[:num_dense])
        active = round(_left(job.active, job.num_layers, num_dense) * share, 6)
        recipe = dataclasses.replace(
            job.recipe,
            layers=ranges([n for i, n in enumerate(job.kept) if i not in dense]),
            active=active,
        )
        # The class that can leave these layers dense may be another, which lacks the small experts.
        for candidate in (_refined(recipe, job, active / share), recipe):
            try:
                # The router was admitted with `job`.
                return prepare(candidate, control=True, source=job.source)
            except MoefyError:
                if num_dense == 0 and candidate is recipe:
                    raise
    raise AssertionError("no dense layer at all is the last candidate")


def _refined(recipe: Recipe, job: Job, active: float) -> Recipe:
    """The recipe with the shape of least loss, where it leaves the shape open and that one fits."""
    asked = (recipe.experts, recipe.top_k, recipe.shared_fraction)
    if recipe.overlap > 1 or any(number is not None for number in asked):
        return recipe
    shape = fine(job.shape.num_neurons, active, job.target.fits)
    if shape is None:
        return recipe
    return dataclasses.replace(
        recipe,
        experts=shape.num_experts,
        top_k=shape.experts_per_token,
        shared_fraction=round(shape.num_shared / shape.num_neurons, 6),
    )


def sensitivities(job: Job, tokens: Tokens, watch: Watch) -> list[float]:
    """KL divergence, in nats per token, to the dense model when one layer alone is pruned.

    Pruned statically to the active fraction, with refit. Every layer opens a branch of the held-out
    states, in which it is pruned and nothing else is; all branches go through the later layers
    together, so that one layer at a time is in memory. Of the whole walk the branches cost about
    L / 2 times as much as their tokens in a forward pass.
    """
    fitted, probes = pieces(tokens)
    num_fit, length = fitted.shape
    ids_BT = torch.cat([fitted, probes])
    num_tokens, num_probed = ids_BT.numel(), probes.numel()
    method, shape = Method(static.split, None, refit=True), pruned(job.shape)
    states_BTD = forward.embed(job.checkpoint, job.family, ids_BT, job.device)
    for layer in range(job.num_layers):
        watch("sensitivity of the layers", layer, job.num_layers)
        ffn = forward.read_ffn(job.checkpoint, job.family, layer, job.device)
        x_TD, join, leave = forward.tap(job.checkpoint, job.family, layer, states_BTD)
        flat_TD = states_BTD.view(x_TD.shape)
        inputs = Inputs(x_TD[:num_tokens], num_probed, flat_TD[:num_tokens], join)
        block = convert_block(ffn, inputs, shape, method, dtype=torch.float32, seed=0)
        y_TD = block.y_TD[num_tokens - num_probed :]
        branch_TD = flat_TD[num_tokens - num_probed : num_tokens] + (join(y_TD) if join else y_TD)
        for start in range(0, len(x_TD), 2048):
            part = slice(start, start + 2048)
            y_TD = ffn.activations(x_TD[part]) @ ffn.down_DF.T
            flat_TD[part] += join(y_TD) if join else y_TD
        flat_TD.copy_(leave(flat_TD))
        branch_TD = leave(branch_TD)
        states_BTD = torch.cat([states_BTD, branch_TD.view(-1, length, branch_TD.shape[1])])
    ends = states_BTD[num_fit:].split(len(probes))
    logits = forward.ending(job.checkpoint, job.family)
    return [divergence(logits, ends[0], branch_BTD) for branch_BTD in ends[1:]]


def pieces(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Pieces to fit on and to probe, (B, T): spread evenly over what the tokens have of either."""
    length = min(PIECE, tokens.ids_BT.shape[1])
    parts = []
    for ids_BT, most in zip(
        tokens.ids_BT.split([len(tokens.ids_BT) - tokens.num_heldout, tokens.num_heldout]),
        (FITTED, PROBES),
        strict=True,
    ):
        whole = ids_BT.shape[1] // length * length
        all_BT = ids_BT[:, :whole].reshape(-1, length)
        place = torch.linspace(0, len(all_BT) - 1, min(most, len(all_BT))).long()
        parts.append(all_BT[place])
    return parts[0], parts[1]


def divergence(logits: Callable[[Tensor], Tensor], dense_BTD: Tensor, other_BTD: Tensor) -> float:
    """Mean KL divergence of the predictions from the dense ones."""
    total = 0.0
    for dense_TD, other_TD in zip(dense_BTD, other_BTD, strict=True):
        dense_TV = logits(dense_TD).float().log_softmax(-1)
        other_TV = logits(other_TD).float().log_softmax(-1)
        total += float((dense_TV.exp() * (dense_TV - other_TV)).sum(-1).mean())
    return total / len(dense_BTD)


def _left(active: float, num_layers: int, num_dense: int) -> float:
    """Active fraction of the other layers when `num_dense` run whole."""
    return (active * num_layers - num_dense) / (num_layers - num_dense)


def _promised(loss_L: list[float], active: float, num_dense: int) -> float:
    """The loss to expect with the `num_dense` most sensitive layers dense.

    Sensitivities add up, and grow by `GROWTH` as the other layers shrink. No layer shrinks to less
    than half of the active fraction, where this would be guessing.
    """
    left = _left(active, len(loss_L), num_dense)
    if left < active / 2:
        return float("inf")
    rest = sum(sorted(loss_L)[: len(loss_L) - num_dense])
    return rest * ((1 - left) / max(1 - active, 1e-9)) ** GROWTH


def ranges(layers: list[int]) -> str:
    """Layers as `--layers` takes them."""
    groups = itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    parts = [[layer for _, layer in group] for _, group in groups]
    return ",".join(f"{part[0]}:{part[-1] + 1}" for part in parts)
