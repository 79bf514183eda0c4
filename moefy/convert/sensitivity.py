"""Which layers stay dense: one budget of active FFN neurons, spent where it is missed most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from operator import itemgetter

import torch
from torch import Tensor

from moefy.convert import forward
from moefy.convert.choose import most_dense, named_engines
from moefy.convert.ffn import Method, convert_block
from moefy.convert.partition import static
from moefy.convert.prepare import Job, prepare
from moefy.convert.profile import Inputs
from moefy.errors import MoefyError
from moefy.models.choice import SLACK, expected_loss, layer_sizes, relative_time
from moefy.models.shape import pruned
from moefy.progress import Watch
from moefy.text.packing import Tokens

PIECES = (32, 32, 12)
"""Tokens of a piece of a sequence, pieces to fit on, and held-out ones on which the sensitivities
are measured. SmolLM2-135M takes 45 s of a core. With 4 held-out pieces it takes 21 s, and what is
measured of a layer varies by a third with the text."""

GROWTH = 2.0
"""Loss is taken to grow with this power of the share of neurons left out. With the bits of choice
of the shapes, that foretells nine conversions of SmolLM2-135M at 0.5, with none to four dense
layers, up to 8 % (recipes/results/shapes.md)."""


def settle(job: Job, loss_L: list[float]) -> Job:
    """Replace `layers = "auto"` by the layers to convert, and `active` by what they then have left.

    `active` counts all layers: those that stay dense take theirs from the others. That set stays
    dense which promises the least loss with the shape that the others then get; of as many layers,
    the most sensitive ones that the class can leave dense. Where engines are named, a set is out
    that takes 5 % more time than converting all layers. `loss_L` is what `sensitivities` gives.
    """
    most = SLACK * _time(job)
    # The recipe's fraction is of all layers of the model; none is active in those that are dropped.
    share = job.num_layers / job.source.num_layers
    promised: list[tuple[float, Job]] = []
    for sets in dense_sets(loss_L, job.active):
        for dense in sets:
            recipe = dataclasses.replace(
                job.recipe,
                layers=ranges([n for i, n in enumerate(job.kept) if i not in dense]),
                active=round(_left(job.active, job.num_layers, len(dense)) * share, 6),
            )
            try:
                # The router was admitted with `job`.
                settled = prepare(recipe, control=True, source=job.source)
            except MoefyError:
                if not dense:
                    raise
                continue
            if not dense or _time(settled) <= most:
                rest = sum(loss for layer, loss in enumerate(loss_L) if layer not in dense)
                promised.append((rest * expected_loss(settled.shape, GROWTH), settled))
            break
    return min(promised, key=itemgetter(0))[1]


def _time(job: Job) -> float:
    """Expected time of all layers as a part of the dense model's, in the engines that are named."""
    engines = [engine.name for engine in named_engines(job.recipe)]
    if not engines:
        return 0.0
    sizes = layer_sizes(job.family, job.checkpoint.config, job.checkpoint.entries)
    converted = len(job.layers) * relative_time(sizes, job.shape, engines)
    return (job.num_layers - len(job.layers) + converted) / job.num_layers


def dense_sets(loss_L: list[float], active: float) -> list[list[frozenset[int]]]:
    """Sets of layers that may stay dense, by their number from none on; of each number the most
    sensitive ones first.

    Behind them the first layers beside the last ones: some classes hold dense layers at the ends
    alone.
    """
    count = len(loss_L)

    def most_sensitive(dense: frozenset[int]) -> tuple[float, list[int]]:
        return -sum(loss_L[layer] for layer in dense), sorted(dense)

    order = sorted(range(count), key=lambda layer: -loss_L[layer])
    by_number = []
    for number in range(most_dense(count, active) + 1):
        ends = {
            frozenset((*range(first), *range(count - number + first, count)))
            for first in range(number + 1)
        }
        by_number.append([frozenset(order[:number]), *sorted(ends, key=most_sensitive)])
    return by_number


def sensitivities(job: Job, tokens: Tokens, watch: Watch) -> list[float]:
    """KL divergence, in nats per token, to the dense model when one layer alone is pruned.

    Pruned statically to the active fraction, with refit. Every layer opens a branch of the held-out
    states, in which it is pruned and nothing else is; all branches go through the later layers
    together, so that one layer at a time is in memory. Of the whole walk the branches cost about
    L / 2 times as much as their tokens in a forward pass.
    """
    fitted, probes = pieces(tokens, *PIECES)
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


def pieces(tokens: Tokens, length: int, num_fitted: int, num_probes: int) -> tuple[Tensor, Tensor]:
    """Pieces to fit on and to probe, (B, T): spread evenly over what the tokens have of either.

    Short ones take few tokens from many documents.
    """
    length = min(length, tokens.ids_BT.shape[1])
    parts = []
    for ids_BT, most in zip(
        tokens.ids_BT.split([len(tokens.ids_BT) - tokens.num_heldout, tokens.num_heldout]),
        (num_fitted, num_probes),
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


def ranges(layers: list[int]) -> str:
    """Layers as `--layers` takes them."""
    groups = itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    parts = [[layer for _, layer in group] for _, group in groups]
    return ",".join(f"{part[0]}:{part[-1] + 1}" for part in parts)
