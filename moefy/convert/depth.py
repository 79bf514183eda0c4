"""Which layers to drop: greedily, by what the predictions lose."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.cut import num_parameters, without
from moefy.checkpoint.tensors import Checkpoint
from moefy.config.layer_names import dropped_layers
from moefy.convert import forward
from moefy.convert.prepare import Job, prepare
from moefy.convert.profile import CHUNK, add_outputs
from moefy.convert.sensitivity import divergence, pieces, ranges
from moefy.files.buffers import MEMORY, Store
from moefy.models.families.family import Family
from moefy.progress import Watch
from moefy.text.tokens import Tokens
from moefy.types import FFN

PROBES = 8
"""Pieces of calibration text on which layers are chosen."""

PIECES = (128, 32, PROBES)
"""Tokens of a piece, and how many there are, as `sensitivity.pieces` takes them."""


Losses = Sequence[tuple[float, int]]
"""KL divergences and the layers that are left out for each, the least first."""

Known = Callable[[tuple[int, ...], Callable[[], Losses]], Losses]


@dataclass(frozen=True)
class Drop:
    """One layer more that is left out."""

    layer: int  # its number in the dense model
    kl: float  # to the whole model, in nats per token, without this layer and all before it
    parameters: int  # of the model that is left


def probes(tokens: Tokens) -> Tensor:
    """The pieces of calibration text on which layers are chosen, (B, T)."""
    fitted, _ = pieces(tokens, *PIECES)
    return fitted[torch.linspace(0, len(fitted) - 1, min(PROBES, len(fitted))).long()]


def drops(
    checkpoint: Checkpoint,
    family: Family,
    ids_BT: Tensor,
    device: torch.device,
    watch: Watch = lambda *_: None,
    known: Known = lambda _, measure: measure(),
) -> Iterator[Drop]:
    """Drop layer after layer: each time the one whose absence costs the least KL divergence on the
    token ids, given those that are gone already.

    A step is one walk through the layers, one of which is in memory at a time. After the first,
    only the half of the layers that cost least in the step before are tried. A step asks `known`
    for its losses, and tells it which layers are gone: it may have them from an earlier run.

    Source: greedy removal by the loss of the whole model is that of SLEB (arXiv 2402.09025), which
    takes perplexity in place of KL.
    """
    num_layers = int(checkpoint.config["num_hidden_layers"])  # pyright: ignore[reportArgumentType]
    logits = forward.ending(checkpoint, family)
    dropped: list[int] = []
    candidates = list(range(num_layers))

    def ends(layers: Sequence[int], tried: Sequence[int]) -> list[Tensor]:
        entering_BTD = forward.embed(checkpoint, family, ids_BT, device)
        return _branches(checkpoint, family, entering_BTD, layers, tried, watch)

    @functools.cache
    def dense_BTD() -> Tensor:
        return ends(range(num_layers), ())[0]

    def losses() -> list[tuple[float, int]]:
        left = [layer for layer in range(num_layers) if layer not in dropped]
        _, *without_BTD = ends(left, candidates)
        tried = zip(without_BTD, sorted(candidates), strict=True)
        return sorted((divergence(logits, dense_BTD(), end), layer) for end, layer in tried)

    while len(dropped) < num_layers - 1:
        (loss, layer), *others = known(tuple(dropped), losses)
        half = max((num_layers - len(dropped)) // 2, 2)
        dropped.append(layer)
        yield Drop(layer, loss, num_parameters(without(checkpoint, family, dropped)))
        candidates = [layer for _, layer in others[: half - 1]]


def chosen(job: Job, tokens: Tokens, watch: Watch) -> list[dict[str, Any]]:
    """As many drops as the job's recipe asks for without naming the layers."""
    count, _ = dropped_layers(job.recipe.drop_layers, job.source.num_layers)
    if job.dropped or not count:
        return []
    order = drops(job.checkpoint, job.family, probes(tokens), job.device, watch)
    return [dataclasses.asdict(drop) for drop in itertools.islice(order, count)]


def settle(job: Job, order: Sequence[Mapping[str, Any]]) -> Job:
    """The job without the layers of `order`, which its recipe then names."""
    if not order:
        return job
    layers = ranges(sorted(drop["layer"] for drop in order))
    recipe = dataclasses.replace(job.recipe, drop_layers=layers)
    return prepare(recipe, control=True, source=job.source)


def supposed(job: Job) -> Job:
    """The job as it may become: the layers that are chosen later are those before the last."""
    count, _ = dropped_layers(job.recipe.drop_layers, job.source.num_layers)
    if job.dropped or not count:
        return job
    last = job.source.num_layers - 1
    return settle(job, [{"layer": layer} for layer in range(last - count, last)])


def searched(job: Job) -> float:
    """Floating-point operations of the search for layers to drop.

    A step tries a layer by going through those behind it, half of all on average, and through the
    head twice. The first step tries every layer, and each after it half of them.
    """
    count, _ = dropped_layers(job.recipe.drop_layers, job.source.num_layers)
    tried = job.source.num_layers * (1 + (count - 1) / 2) if count and not job.dropped else 0
    length, _, pieces = PIECES
    head = job.size("vocab_size") * job.size("hidden_size")
    return tried * length * pieces * 2.0 * (job.num_weights / 2 + 2 * head)


def advance(
    checkpoint: Checkpoint,
    family: Family,
    layer: int,
    states_BTD: Tensor,
    device: torch.device,
    store: Store = MEMORY,
) -> None:
    """Move states, (B, T, D), past one layer of the dense model, in place."""
    ffn = forward.read_ffn(checkpoint, family, layer, device)
    around = forward.passage(checkpoint, family, layer, device, store=store)
    past(ffn, around, states_BTD, store)
    leave(around, states_BTD, store)


def block(length: int) -> int:
    """Sequences of `length` tokens that attention and the FFN compute at a time."""
    return max(forward.BATCH, CHUNK // length)


def past(
    ffn: FFN,
    around: forward.Passage,
    states_BTD: Tensor,
    store: Store = MEMORY,
    check: Callable[[Tensor, int], None] = lambda *_: None,
) -> None:
    """Move states, (B, T, D), past a dense FFN and what is `around` it, in place, but for what the
    sum goes through.

    As many sequences as attention and the FFN compute at a time are on the FFN's device. `check`
    sees the FFN's inputs, (T, D), and how many tokens were before them.
    """
    tokens = 0
    for part_BTD in states_BTD.split(block(states_BTD.shape[1])):
        on_BTD = part_BTD.to(ffn.up_FD.device)
        x_BTD = torch.empty_like(on_BTD)
        around.run(on_BTD, x_BTD)
        x_TD = x_BTD.flatten(0, 1)
        check(x_TD, tokens)
        add_outputs(ffn, x_TD, on_BTD.flatten(0, 1), around.join)
        if on_BTD is not part_BTD:
            part_BTD.copy_(on_BTD)
        tokens += len(x_TD)
        store.release()


def leave(around: forward.Passage, states_BTD: Tensor, store: Store = MEMORY) -> None:
    """Move states, (B, T, D), past what the sum goes through, in place."""
    if around.leave:
        for flat_CD in states_BTD.flatten(0, 1).split(CHUNK):
            flat_CD.copy_(around.leave(flat_CD.to(around.device)))
            store.release()


def _branches(
    checkpoint: Checkpoint,
    family: Family,
    states_BTD: Tensor,
    layers: Sequence[int],
    candidates: Sequence[int],
    watch: Watch,
) -> list[Tensor]:
    """What leaves the model of `layers`, then what leaves it without each candidate, in their order
    in the model. All branches go through the later layers together."""
    batch = len(states_BTD)
    for done, layer in enumerate(layers):
        watch("layers to drop", done, len(layers))
        branch_BTD = states_BTD[:batch].clone()
        advance(checkpoint, family, layer, states_BTD, states_BTD.device)
        if layer in candidates:
            states_BTD = torch.cat([states_BTD, branch_BTD])
    return list(states_BTD.split(batch))
