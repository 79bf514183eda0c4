"""Turn a dense checkpoint into a stock MoE checkpoint, one layer at a time."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy import budget, data, environment, output, walk
from moefy.block import Block, convert_block
from moefy.calibration import calibration_tokens, gradients
from moefy.clock import Clock
from moefy.coverage import gaps
from moefy.errors import MoefyError
from moefy.job import Job, Watch
from moefy.memory import predicted, require
from moefy.oracle import attach
from moefy.publish import STATE, place_of, publishing
from moefy.recipe import shard_bytes
from moefy.reopen import reopen
from moefy.scan import Scan, scan
from moefy.shards import ShardWriter
from moefy.state import State
from moefy.summary import END, summarise, write_report


def convert(
    job: Job,
    out: Path,
    *,
    force: bool = False,
    strict: bool = False,
    fresh: bool = False,
    keep: bool = True,
    tokens: data.Tokens | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Run a prepared conversion and publish the folder `out` whole; return its report.

    A conversion that was stopped goes on behind the last layer that it finished, unless `fresh`,
    and ends with the bytes it would have had. With `keep` false, nothing is kept for that.
    `tokens` are used instead of those that the recipe names, when given. With `strict` it fails at
    the first layer of which an expert or a neuron has seen too little text (see `coverage`).

    Raises:
        MoefyError: code 3 for bad weights or calibration text, 5 for what cannot be written, 6 for
            a result that is not finite or not what the reopened folder computes, and if `strict`
            for too little text, 7 for an unfinished conversion of another kind, or one that is
            damaged.
    """
    _check_places(job, out, keep)
    require(predicted(job, output.slots(job)), "this conversion", "lower --tokens")
    with publishing(out, force=force, resume=keep, fresh=fresh) as part:
        state = State(part.with_name(STATE) if keep else None)
        state.claim(_facts(job))
        clock = Clock(state.load("seconds") or {})
        with clock.stage("check weights"):
            scanned = check_weights(job, watch)
        state.claim({"inputs": scanned.digests})
        with clock.stage("calibration text"):
            tokens = tokens or _tokens(job, state, watch)
        state.claim({"calibration": tokens.sha256})
        loss_L: list[float] = []
        asked = job.recipe.active
        if job.recipe.layers == budget.AUTO:
            with clock.stage("sensitivity"):
                loss_L = state.load("sensitivities") or budget.sensitivities(job, tokens, watch)
                state.save("sensitivities", loss_L)
                job = budget.settle(job, loss_L)
        size = shard_bytes(job.recipe.max_shard_size)
        writer = ShardWriter(part, output.slots(job), shard_bytes=size, resume=True)
        with clock.stage("copy"):
            copied = state.load("copied")
            if copied is None or not writer.keep(copied):
                output.copy(job, writer, watch)
                state.save("copied", writer.sync(writer.digests))
        slopes: dict[int, Tensor] = {}
        if job.method.gradient:
            with clock.stage("gradients"):
                slopes = _gradients(job, tokens, state, watch)
        with clock.stage("layers"):
            figures, ends, norms = _layers(job, tokens, slopes, writer, state, clock, watch, strict)
        with clock.stage("write"):
            writer.finish()
            output.write_folder(job, part)
        with clock.stage("reopen"):
            checked = reopen(
                part,
                tokens.ids_BT[-1],
                ends,
                layer=job.target.prefix + job.family.layer,
                task=job.task,
                prepare=lambda model: attach(model, norms),
            )
        job = dataclasses.replace(job, notes=(*job.notes, *scanned.notes, *gaps(figures)))
        summary = summarise(job, tokens, figures, checked, clock.seconds(), scanned.digests)
        if loss_L:
            summary["budget"] = {"active": asked, "kl_when_pruned_alone": loss_L}
        extra = {"ids": tokens.ids_BT.int(), END: ends[checked["layers"] - 1]}
        extra |= {f"norm.{layer}": norm for layer, norm in norms.items()}
        write_report(job, part, summary, extra)
    return summary


def _check_places(job: Job, out: Path, keep: bool) -> None:
    """Refuse an OUT inside or around the model, and a disk that is too small."""
    source = job.checkpoint.folder.resolve()
    place = out.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise MoefyError(f"OUT {out} lies inside MODEL {source}, or around it; move OUT", code=2)
    near = next(folder for folder in (place, *place.parents) if folder.exists())
    begun = place_of(place)
    # What a stopped run has written already is not needed again.
    needed = sum(slot.num_bytes for slot in output.slots(job).values()) - _used(begun)
    needed += state_bytes(job) if keep else 0
    free = shutil.disk_usage(near).free
    if free < 1.1 * needed:
        others = [found for found in near.glob(".*.moefy-part") if found != begun]
        held = ", ".join(f"{found.name} ({_used(found) / 1e9:.1f} GB)" for found in others)
        held = f" (unfinished runs are there: {held})" if held else ""
        raise MoefyError(
            f"{near} has {free / 1e9:.1f} GB free; the result and what is kept until it is whole "
            f"need {1.1 * needed / 1e9:.1f} GB; free some or choose another OUT{held}",
            code=5,
        )


def _used(folder: Path) -> int:
    """Bytes on disk of the files below a folder."""
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def state_bytes(job: Job) -> int:
    """Bytes on disk that a conversion keeps until it is whole, in order to go on if it is stopped.

    Two generations of states between layers, another being written, and the last sequence's behind
    every layer.
    """
    hidden = 4 * job.size("hidden_size")
    states = job.recipe.tokens * hidden * (2 if job.method.drift else 1)
    ends = job.recipe.sequence_length * hidden * job.num_layers
    slopes = job.recipe.tokens * hidden // 2 * len(job.layers) if job.method.gradient else 0
    return 3 * states + ends + slopes + 8 * job.recipe.tokens


def check_weights(job: Job, watch: Watch) -> Scan:
    """Look at all values before any work, for what NaN makes a model write is no text either."""
    ffn = {name for layer in job.layers for name in job.family.ffn_names(layer)}
    return scan(job.checkpoint, ffn, partial(watch, "check weights"))


def _facts(job: Job) -> dict[str, Any]:
    """What decides the bytes of the result, beside the model's files and the calibration tokens."""
    return {
        "moefy": environment.code(),
        "recipe": dataclasses.asdict(job.recipe),
        "shape": dataclasses.asdict(job.shape),
        "versions": environment.versions(),
        "machine": environment.machine(job.device),
    }


def _tokens(job: Job, state: State, watch: Watch) -> data.Tokens:
    """The calibration tokens; those that the model writes itself, which takes long, are kept."""
    if job.recipe.calibration != "self":
        return calibration_tokens(job, watch)
    if found := state.load_tensors("tokens"):
        tensors, told = found
        return data.Tokens(tensors["ids"], **{**told, "notes": tuple(told["notes"])})
    tokens = calibration_tokens(job, watch)
    told = {key: value for key, value in vars(tokens).items() if key != "ids_BT"}
    state.save_tensors("tokens", {"ids": tokens.ids_BT}, told)
    return tokens


def _gradients(job: Job, tokens: data.Tokens, state: State, watch: Watch) -> dict[int, Tensor]:
    """The gradients that a partition asks for, which are kept."""
    if found := state.load_tensors("gradients"):
        return {int(layer): tensor for layer, tensor in found[0].items()}
    slopes = gradients(job, tokens, watch)
    state.save_tensors("gradients", {str(layer): slope for layer, slope in slopes.items()})
    return slopes


def _layers(
    job: Job,
    tokens: data.Tokens,
    slopes: dict[int, Tensor],
    writer: ShardWriter,
    state: State,
    clock: Clock,
    watch: Watch,
    strict: bool,
) -> tuple[list[dict[str, Any]], list[Tensor], dict[int, Tensor]]:
    """Convert layer by layer, writing each, behind those that are done already.

    Gives every converted layer's figures, the states that leave every layer on the last sequence,
    and the norms of routers that are no rows.
    """
    states_BTD, kept = state.layers(writer)
    if states_BTD is None:
        # With a refit against drift, the dense model's states go along behind the converted one's.
        ids_BT = torch.cat([tokens.ids_BT] * (2 if job.method.drift else 1))
        states_BTD = walk.embed(job.checkpoint, job.family, ids_BT, job.device)
    else:
        watch(f"continuing behind layer {len(kept) - 1}", len(kept), job.num_layers)
    done = list(kept)
    states_BTD = states_BTD.to(job.device)
    for layer, block in _walk(job, states_BTD, tokens, slopes, len(kept), watch):
        extra = {"end": states_BTD[len(tokens.ids_BT) - 1].clone()}
        value, names = None, []
        if isinstance(block, Block):
            names = output.write_block(job, writer, layer, block)
            value = {"layer": layer, **block.figures}
            if strict and (found := gaps([value])):
                raise MoefyError(f"--strict: {found[0]}", code=6)
            if block.router.norm_EN is not None:
                extra["norm"] = block.router.norm_EN
        done.append((extra, value))
        state.save("seconds", clock.seconds())
        state.save_layer(layer, states_BTD, extra, writer.sync(names), value)
        watch("layers", layer + 1, job.num_layers)
    figures = [value for _, value in done if value]
    ends = [tensors["end"] for tensors, _ in done]
    norms = {layer: kept["norm"] for layer, (kept, _) in enumerate(done) if "norm" in kept}
    return figures, ends, norms


def _walk(
    job: Job,
    states_BTD: Tensor,
    tokens: data.Tokens,
    slopes: dict[int, Tensor],
    first: int,
    watch: Watch,
) -> Iterator[tuple[int, Block | None]]:
    """Yield each layer's converted block (None where dense), having moved the states past it, from
    layer `first` on.

    The first sequences of `states_BTD` are those of `tokens`; any others go through the dense FFNs.
    """
    config = walk.model_config(job.checkpoint)
    activation = getattr(config, job.family.activation, "silu")
    num_tokens, heldout = tokens.ids_BT.numel(), tokens.num_heldout * tokens.ids_BT.shape[1]
    for layer in range(first, job.num_layers):
        watch(f"layer {layer}: attention", layer, job.num_layers)
        ffn = walk.read_ffn(job.checkpoint, job.family, layer, activation, job.device)
        x_TD, join, leave = walk.tap(job.checkpoint, job.family, config, layer, states_BTD)
        _check_states(x_TD, layer)
        flat_TD = states_BTD.view(x_TD.shape)
        converted = layer in job.layers
        for start in range(num_tokens if converted else 0, len(x_TD), 2048):
            part = slice(start, start + 2048)
            y_TD = ffn.activations(x_TD[part]) @ ffn.down_DF.T
            flat_TD[part] += join(y_TD) if join else y_TD
        if not converted:
            flat_TD.copy_(leave(flat_TD))
            yield layer, None
            continue
        watch(f"layer {layer}: split and route", layer, job.num_layers)
        seed = job.recipe.seed * 1_000_003 + layer
        block = convert_block(
            ffn,
            x_TD[:num_tokens],
            flat_TD[:num_tokens],
            heldout,
            job.shape,
            job.method,
            dtype=job.dtype,
            seed=seed,
            join=join,
            dense_TD=flat_TD[num_tokens:] if job.method.drift else None,
            gradient_TD=slopes.pop(layer, None),
        )
        flat_TD[:num_tokens] += join(block.y_TD) if join else block.y_TD
        flat_TD.copy_(leave(flat_TD))
        yield layer, block


def _check_states(x_TD: Tensor, layer: int) -> None:
    finite_T = torch.isfinite(x_TD).all(1)
    if not finite_T.all():
        row = int((~finite_T).nonzero()[0])
        raise MoefyError(
            f"activations that are not finite enter the FFN of layer {layer} at calibration token "
            f"{row}; the weights or the dtype overflow",
            code=6,
        )
