"""Which layers stay dense: one budget of active FFN neurons, spent where it is missed most."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from moefy.convert import forward
from moefy.convert.choose import most_dense, named_engines
from moefy.convert.ffn import Method, convert_block
from moefy.convert.partition import static
from moefy.convert.prepare import Job, prepare
from moefy.convert.profile import Inputs, add_outputs
from moefy.errors import MoefyError
from moefy.files.buffers import Store
from moefy.models.choice import SLACK, expected_loss, layer_sizes, relative_time
from moefy.models.shape import pruned
from moefy.progress import Watch
from moefy.text.tokens import Tokens

PIECES = (32, 96, 12)
"""Tokens of a piece of a sequence, pieces to fit on, and held-out ones that measure. It takes 60 s
of a core with SmolLM2-135M, a conversion of 16,384 tokens 240 s."""


@dataclass(frozen=True)
class Savings:
    """What dense layers are worth, in nats of KL divergence from the dense model."""

    kl: float  # with all layers pruned
    saved_L: list[float]  # by each layer if it alone stays dense


def settle(job: Job, savings: Savings) -> Job:
    """Replace `layers = "auto"` by the layers to convert, and `active` by what they then have left.

    `active` counts all layers: those that stay dense take theirs from the others. That set stays
    dense which promises the least loss with the shape that the others then get; of as many layers,
    those that save most and that the class can leave dense. Where engines are named, a set is out
    that takes 5 % more time than converting all layers.
    """
    most = SLACK * _time(job)
    # The recipe's fraction is of all layers of the model; none is active in those that are dropped.
    share = job.num_layers / job.source.num_layers
    promised: list[tuple[float, Job]] = []
    for sets in dense_sets(savings.saved_L, job.active):
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
                # What a dense layer saves does not grow with the loss of the others: the savings of
                # several are chosen from noisy ones, and do not quite add up.
                loss = savings.kl * expected_loss(settled.shape) / expected_loss(job.shape)
                loss -= sum(savings.saved_L[layer] for layer in dense)
                promised.append((loss, settled))
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


def dense_sets(saved_L: list[float], active: float) -> list[list[frozenset[int]]]:
    """Sets of layers that may stay dense, by their number from none on; of each number those first
    that save most.

    Behind them the first layers beside the last ones: some classes hold dense layers at the ends
    alone.
    """
    count = len(saved_L)

    def order(dense: frozenset[int]) -> tuple[float, list[int]]:
        return -sum(saved_L[layer] for layer in dense), sorted(dense)

    best = sorted(range(count), key=lambda layer: -saved_L[layer])
    by_number = []
    for number in range(most_dense(count, active) + 1):
        ends = {
            frozenset((*range(first), *range(count - number + first, count)))
            for first in range(number + 1)
        }
        by_number.append([frozenset(best[:number]), *sorted(ends, key=order)])
    return by_number


def savings(job: Job, tokens: Tokens, watch: Watch) -> Savings:
    """What each layer saves if it alone stays dense and all others are pruned.

    They are pruned statically to the active fraction, with the job's refit: a later layer makes
    good what earlier ones lose, so that the first layers save less than their own loss, and the
    last one more. From every layer on, a branch of the held-out states goes past its dense FFN and
    through the pruned layers behind it. All go through a layer together, so that one at a time is
    in memory. The branches cost about L / 2 times as much as their tokens in a forward pass.
    """
    fitted, probes = pieces(tokens, *PIECES)
    num_tokens, num_probed = fitted.numel() + probes.numel(), probes.numel()
    method = Method(static.split, None, refit=True, error_propagation=job.method.error_propagation)
    ids_BT = torch.cat([fitted, probes])
    # Those of the dense model, those of the pruned one, and behind them the branches.
    states_BTD = forward.embed(job.checkpoint, job.family, ids_BT, job.device).repeat(2, 1, 1)
    pruned_T = slice(num_tokens, 2 * num_tokens)
    for layer in range(job.num_layers):
        watch("sensitivity of the layers", layer, job.num_layers)
        ffn = forward.read_ffn(job.checkpoint, job.family, layer, job.device)
        x_TD, join, leave = forward.tap(job.checkpoint, job.family, layer, states_BTD)
        flat_TD = states_BTD.view(x_TD.shape)
        branch_TD = flat_TD[pruned_T][-num_probed:].clone()
        add_outputs(ffn, x_TD[pruned_T][-num_probed:], branch_TD, join)
        add_outputs(ffn, x_TD[:num_tokens], flat_TD[:num_tokens], join)
        inputs = Inputs(
            x_TD[pruned_T],
            num_probed,
            flat_TD[pruned_T],
            join,
            dense_TD=flat_TD[:num_tokens],
            store=Store(device=job.device),
        )
        block = convert_block(ffn, inputs, pruned(job.shape), method, dtype=torch.float32, seed=0)
        narrow = block.routed.ffn.some(block.routed.partition.shared_S)
        add_outputs(narrow, x_TD[num_tokens:], flat_TD[num_tokens:], join)
        states_BTD = torch.cat([states_BTD, branch_TD.view(*probes.shape, -1)])
        states_BTD = leave(states_BTD) if leave else states_BTD
    logits = forward.ending(job.checkpoint, job.family)
    dense_BTD, all_BTD, branches_BTD = states_BTD.tensor_split([len(ids_BT), 2 * len(ids_BT)])
    loss = partial(divergence, logits, dense_BTD[len(fitted) :])
    kl = loss(all_BTD[len(fitted) :])
    return Savings(kl, [kl - loss(branch_BTD) for branch_BTD in branches_BTD.split(len(probes))])


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
