"""Convert a model's FFNs layer by layer, each on the states that the converted ones below leave."""

from __future__ import annotations

import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moefy.convert import depth, forward, write
from moefy.convert.copies import copy_block
from moefy.convert.ffn import Block, convert_block
from moefy.convert.prepare import Job
from moefy.convert.profile import CHUNK, Inputs
from moefy.convert.session import Session
from moefy.convert.summary import gaps
from moefy.distributed import Group, Share
from moefy.errors import MoefyError
from moefy.files.buffers import Store
from moefy.files.shards import ShardWriter
from moefy.text.tokens import Tokens
from moefy.timing import Clock


@dataclass(frozen=True)
class Converted:
    """What the conversion of all layers leaves behind, beside their tensors."""

    figures: list[dict[str, Any]]  # figures of every converted layer
    ends: list[Tensor | None]  # what leaves each layer on the last sequence, where it was kept
    norms: dict[int, Tensor]  # the norms of routers that look at activations, by layer


def convert_layers(
    session: Session,
    tokens: Tokens,
    slopes: dict[int, Tensor],
    writer: ShardWriter | None,
    last: int,
) -> Converted:
    """Convert layer by layer, writing each, behind those that are done already.

    The states that leave layer `last` on the last sequence are kept. Below the first layer that is
    converted the dense model's states are the same, and behind the last one only that sequence goes
    on, as far as `last`. The processes of the group share the sequences; only the first has a
    `writer`. Beside a GPU's work the next layer is read and the last one written.
    """
    job, watch = session.job, session.watch
    top = max(job.layers)
    share = shared(session.attempt.group, *tokens.ids_BT.shape)
    first_heldout = len(tokens.ids_BT) - tokens.num_heldout
    num_heldout = max(0, share.piece.stop - max(share.piece.start, first_heldout))
    own_BT = share.own(tokens.ids_BT)
    tokens = dataclasses.replace(tokens, ids_BT=own_BT, num_heldout=num_heldout)
    num_sequences = len(own_BT)
    states_BTD, done = _begun(session, writer, share, top)
    if states_BTD is None:
        states_BTD = _embedded(job, tokens, session.store)
    else:
        watch(f"continuing behind layer {len(done) - 1}", len(done), job.num_layers)
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[Session] | None = None
        saved: Future[None] | None = None
        for layer in range(len(done), end := max(last, top) + 1):
            if layer > top:
                states_BTD = share.last(states_BTD[:num_sequences])[None]
            now, ahead = ahead.result() if ahead else session, None
            if _beside(job.device) and layer + 1 < end:
                ahead = pool.submit(_holding, session, layer + 1)
            extra, tensors, figures = _convert(now, layer, states_BTD, tokens, slopes)
            if figures and session.attempt.strict and (notes := gaps([figures])):
                raise MoefyError(f"--strict: {notes[0]}", code=6)
            if layer == last:
                extra["end"] = share.last(states_BTD[:num_sequences])
            done.append((extra, figures))
            whole_BTD = states_BTD if layer > top else share.whole(states_BTD)
            if saved:
                saved.result()
            if writer:
                kept_BTD = whole_BTD.to("cpu", copy=_beside(states_BTD.device))
                save = partial(_save, session, writer, layer, kept_BTD, extra, tensors, figures)
                saved = pool.submit(save) if _beside(states_BTD.device) else save()
                del kept_BTD, save
            del whole_BTD, tensors
            session.store.release()
            watch("layers", layer + 1, job.num_layers)
        if saved:
            saved.result()
    watch("layers", job.num_layers, job.num_layers)
    return Converted(
        [figures for _, figures in done if figures],
        [extra.get("end") for extra, _ in done] + [None] * (job.num_layers - len(done)),
        {layer: extra["norm"] for layer, (extra, _) in enumerate(done) if "norm" in extra},
    )


def shared(group: Group, num_sequences: int, length: int) -> Share:
    """Divide sequences of `length` tokens among the processes, in blocks that attention and the FFN
    compute at a time.

    Raises:
        MoefyError: code 2, where some processes have none.
    """
    block = depth.block(length)
    if group.size > (most := -(-num_sequences // block)):
        raise MoefyError(
            f"{group.size} processes share {num_sequences} sequences, {block} of which stay "
            f"together; start {most} at most, or raise --tokens",
            code=2,
        )
    return Share(group, num_sequences, block)


def _begun(
    session: Session, writer: ShardWriter | None, share: Share, top: int
) -> tuple[Tensor | None, list[tuple[dict[str, Tensor], Any]]]:
    """The states of this process's sequences behind the last layer that is done, and what was kept
    of each, from the process that has them."""
    group, store = session.attempt.group, session.store
    states_BTD, done = session.state.layers(writer, store) if writer else (None, [])
    size = None if states_BTD is None else states_BTD.shape
    count, size = group.broadcast_object((len(done), size))
    if size is None:
        return None, done
    if states_BTD is None:
        states_BTD, done = store.empty(*size), [({}, None)] * count
    states_BTD = group.broadcast(states_BTD)
    return states_BTD if len(done) > top + 1 else share.own(states_BTD), done


def _embedded(job: Job, tokens: Tokens, store: Store) -> Tensor:
    """What enters the first layer, (B, T, D). With a refit against drift twice: the dense model's
    states go along behind the converted one's."""
    (num_sequences, length), hidden = tokens.ids_BT.shape, job.size("hidden_size")
    sides = 2 if job.method.error_propagation else 1
    states_BTD = store.empty(sides * num_sequences, length, hidden)
    for start in range(0, num_sequences, 32):  # as many are looked up at a time
        ids_BT = tokens.ids_BT[start : start + 32]
        part_BTD = forward.embed(job.checkpoint, job.family, ids_BT, job.device)
        for side_BTD in states_BTD.split(num_sequences):
            side_BTD[start : start + len(ids_BT)] = part_BTD
        store.release()
    return states_BTD


def _convert(
    session: Session,
    layer: int,
    states_BTD: Tensor,
    tokens: Tokens,
    slopes: dict[int, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any] | None]:
    """Convert one layer, or leave it dense, and move the states past it.

    Gives tensors to keep, those to write, and the layer's figures.
    """
    own = dataclasses.replace(session, clock=Clock({}))
    num_sequences = len(tokens.ids_BT)
    # Nothing before it is converted or dropped.
    alike = layer < min(session.job.layers) and session.job.kept[layer] == layer
    going_BTD = states_BTD[:num_sequences] if alike else states_BTD
    block = _pass(own, layer, going_BTD, tokens, slopes)
    if alike and len(states_BTD) > num_sequences:
        states_BTD[num_sequences:] = going_BTD
    if block is None:
        return {}, {}, None
    with own.clock.stage("write"):
        first = session.attempt.group.rank == 0
        tensors = write.block_tensors(session.job, layer, block) if first else {}
    figures: dict[str, Any] = {"layer": layer, **block.figures}
    seconds = {stage: round(s, 3) for stage, s in own.clock.seconds().items() if stage != "total"}
    figures["stage_seconds"] = {**seconds, **figures["stage_seconds"]}
    norm_EN = block.routed.router.norm_EN
    return {} if norm_EN is None else {"norm": norm_EN.cpu()}, tensors, figures


def _beside(device: torch.device) -> bool:
    """Whether layers are read and written beside what this device computes; a CPU does it all."""
    return device.type == "cuda"


def _holding(session: Session, layer: int) -> Session:
    """The same, with one layer's stored tensors in memory."""
    checkpoint = session.job.checkpoint.holding(session.job.family.layer.format(layer=layer))
    return dataclasses.replace(session, job=dataclasses.replace(session.job, checkpoint=checkpoint))


def _save(
    session: Session,
    writer: ShardWriter,
    layer: int,
    states_BTD: Tensor,
    extra: dict[str, Tensor],
    tensors: dict[str, Tensor],
    figures: dict[str, Any] | None,
) -> None:
    """Write a layer's tensors, and then record it as done with the states behind it."""
    start = time.perf_counter()
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    if figures:
        seconds = figures["stage_seconds"]
        seconds["write"] = round(seconds["write"] + time.perf_counter() - start, 3)
    session.state.save("seconds", session.clock.seconds())
    session.state.save_layer(layer, states_BTD, extra, writer.sync(tensors), figures)


def _pass(
    session: Session, layer: int, states_BTD: Tensor, tokens: Tokens, slopes: dict[int, Tensor]
) -> Block | None:
    """Move the states past one layer; give what it is converted to, None where it stays dense.

    The first sequences of `states_BTD` are those of `tokens`; any others go through the dense FFN.
    """
    job, store, clock = session.job, session.store, session.clock
    session.watch(f"layer {layer}: attention", layer, job.num_layers)
    num_sequences = len(tokens.ids_BT)
    if len(states_BTD) > num_sequences:
        with clock.stage("dense"):
            _past_dropped(session, layer, states_BTD[num_sequences:])
    with clock.stage("read"):
        ffn = forward.read_ffn(job.checkpoint, job.family, layer, job.device)
        around = forward.passage(job.checkpoint, job.family, layer, job.device, store=store)
    own_BTD = states_BTD[: num_sequences if layer in job.layers else 0]
    with clock.stage("dense"):
        check = partial(_check_states, layer)
        depth.past(ffn, around, states_BTD[len(own_BTD) :], store, check)
    if not len(own_BTD):
        depth.leave(around, states_BTD, store)
        return None
    with clock.stage("attention"):
        x_BTD = store.empty(*own_BTD.shape)
        around.run(own_BTD, x_BTD)
        x_TD, own_TD = x_BTD.flatten(0, 1), own_BTD.flatten(0, 1)
        check(x_TD)
    session.watch(f"layer {layer}: split and route", layer, job.num_layers)
    inputs = Inputs(
        x_TD,
        tokens.num_heldout * tokens.ids_BT.shape[1],
        own_TD,
        around.join,
        dense_TD=states_BTD[num_sequences:].flatten(0, 1) if job.method.error_propagation else None,
        gradient_TD=slopes.pop(layer, None),
        store=store,
        group=session.attempt.group,
        length=tokens.ids_BT.shape[1],
    )
    seed = job.recipe.seed * 1_000_003 + layer
    convert = copy_block if job.method.copies else convert_block
    block = convert(ffn, inputs, job.shape, job.method, dtype=job.dtype, seed=seed)
    for y_CD, own_CD in zip(block.y_TD.split(CHUNK), own_TD.split(CHUNK), strict=True):
        own_CD += (around.join(y_CD.to(job.device)) if around.join else y_CD).to(own_CD.device)
        store.release()
    depth.leave(around, states_BTD, store)
    return block


def _past_dropped(session: Session, layer: int, dense_BTD: Tensor) -> None:
    """Move the dense model's states past the layers that are dropped before `layer`."""
    job = session.job
    first = job.kept[layer - 1] + 1 if layer else 0
    for number in range(first, job.kept[layer]):
        depth.advance(
            job.source.checkpoint, job.family, number, dense_BTD, job.device, session.store
        )


def _check_states(layer: int, x_TD: Tensor, before: int = 0) -> None:
    for number, x_CD in enumerate(x_TD.split(CHUNK)):
        finite_C = torch.isfinite(x_CD).all(1)
        if not finite_C.all():
            row = before + number * CHUNK + int((~finite_C).nonzero()[0])
            raise MoefyError(
                f"activations that are not finite enter the FFN of layer {layer} at calibration "
                f"token {row}; the weights or the dtype overflow",
                code=6,
            )
