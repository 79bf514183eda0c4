"""Turn a dense checkpoint into a stock MoE checkpoint, one layer at a time."""

from __future__ import annotations

import dataclasses
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy import environment
from moefy.checkpoint.check_values import Scan, scan
from moefy.checkpoint.reload import fitting_layers, reopen
from moefy.config.recipe import num_bytes
from moefy.convert import sensitivity, write
from moefy.convert.calibration import SELF, calibration_tokens, gradients
from moefy.convert.coverage import gaps
from moefy.convert.layers import convert_layers, shared
from moefy.convert.memory import Plan, fit, state_bytes
from moefy.convert.oracle import attach
from moefy.convert.prepare import Job, Watch
from moefy.convert.summary import END, summarise, write_report
from moefy.distributed import ALONE, Group
from moefy.errors import MoefyError
from moefy.files.buffers import Store
from moefy.files.publish import STATE, place_of, publishing
from moefy.files.resume import State
from moefy.files.shards import ShardWriter
from moefy.text import packing
from moefy.timing import Clock


def convert(
    job: Job,
    out: Path,
    *,
    force: bool = False,
    strict: bool = False,
    restart: bool = False,
    keep: bool = True,
    memory: int | None = None,
    tokens: packing.Tokens | None = None,
    group: Group = ALONE,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Run a prepared conversion and publish the folder `out` whole; return its report.

    A conversion that was stopped goes on behind the last layer that it finished, unless `restart`,
    and ends with the bytes it would have had; one of other settings is discarded with `force`,
    which also replaces `out`. With `keep` false, nothing is kept for that. Where the states of all
    tokens do not fit in `memory` bytes, or in what there is, they lie in files beside OUT (see
    `store`), and the bytes of the result are the same.
    `tokens` are used instead of those that the recipe names, when given. With `strict` it fails at
    the first layer of which an expert or a neuron has seen too little text (see `coverage`).
    The processes of `group` share the calibration tokens; the first one does all else, and writes.

    Raises:
        MoefyError: code 2 for a partition that several processes cannot share, 3 for bad weights or
            calibration text, 5 for what cannot be written or takes more memory even so, 6 for a
            result that is not finite or not what the reopened folder computes, and if `strict` for
            too little text, 7 for an unfinished conversion of another kind, or a damaged one.
    """
    slots = write.slots(job)
    plan = fit(job, slots, memory)
    if plan.refusal:
        raise MoefyError(plan.refusal, code=5)
    if group.size > 1 and job.method.gradient:
        named = f"--partition {job.recipe.partition} takes gradients of all tokens in one process"
        raise MoefyError(f"{named}; start one, or use another", code=2)
    shared(group, job.recipe.tokens // job.recipe.sequence_length, job.recipe.sequence_length)
    if group.rank:
        return _help(job, out, plan, strict, group)
    _check_places(job, out, keep, plan.file_bytes)
    with publishing(out, force=force, resume=keep, restart=restart) as part:
        store = Store(part.parent if plan.file_bytes else None)
        state = State(part.with_name(STATE) if keep else None)
        state.claim(_facts(job, group), force=force)
        clock = Clock(state.load("seconds") or {})
        with clock.stage("check weights"):
            scanned = check_weights(job, watch)
        state.claim({"inputs": scanned.digests}, force=force)
        with clock.stage("calibration text"):
            tokens = tokens or _tokens(job, state, watch, memory)
        state.claim({"calibration": tokens.sha256}, force=force)
        loss_L: list[float] = []
        asked = job.recipe.active
        if job.recipe.layers == sensitivity.AUTO:
            with clock.stage("sensitivity"):
                loss_L = state.load("sensitivities") or sensitivity.sensitivities(
                    job, tokens, watch
                )
                state.save("sensitivities", loss_L)
                job = sensitivity.settle(job, loss_L)
                slots = write.slots(job)
        group.tell((tokens, loss_L))
        size = num_bytes(job.recipe.max_shard_size)
        writer = ShardWriter(part, slots, shard_bytes=size, resume=True)
        with clock.stage("copy"):
            copied = state.load("copied")
            if copied is None or not writer.keep(copied):
                write.copy(job, writer, watch)
                state.save("copied", writer.sync(writer.digests))
        slopes: dict[int, Tensor] = {}
        if job.method.gradient:
            with clock.stage("gradients"):
                slopes = _gradients(job, tokens, state, watch)
        prefix = job.target.prefix + job.family.layer
        last = fitting_layers(slots, job.num_layers, prefix) - 1
        with clock.stage("layers"):
            done = convert_layers(
                job,
                tokens,
                slopes,
                writer,
                state,
                store,
                clock,
                last=last,
                strict=strict,
                watch=watch,
                group=group,
            )
        with clock.stage("write"):
            writer.finish()
            write.write_folder(job, part)
        with clock.stage("reopen"):
            checked = reopen(
                part,
                tokens.ids_BT[-1],
                done.ends,
                layer=prefix,
                task=job.task,
                prepare=lambda model: attach(model, done.norms),
            )
        job = dataclasses.replace(job, notes=(*job.notes, *scanned.notes, *gaps(done.figures)))
        summary = summarise(job, tokens, done.figures, checked, clock.seconds(), scanned.digests)
        summary["machine"] = _machine(job, group)
        summary["memory"] = {"planned_bytes": plan.peak_bytes, "file_bytes": plan.file_bytes}
        if loss_L:
            summary["budget"] = {"active": asked, "kl_when_pruned_alone": loss_L}
        extra = {"ids": tokens.ids_BT.int()}
        if (end_TD := done.ends[checked["layers"] - 1]) is not None:
            extra[END] = end_TD
        extra |= {f"norm.{layer}": norm for layer, norm in done.norms.items()}
        write_report(job, part, summary, extra)
    group.tell(summary)
    return summary


def _help(job: Job, out: Path, plan: Plan, strict: bool, group: Group) -> dict[str, Any]:
    """Do what all processes of `group` do: convert the layers. Gives what the first one reports."""
    tokens, loss_L = group.hear()
    if loss_L:
        job = sensitivity.settle(job, loss_L)
    slots, prefix = write.slots(job), job.target.prefix + job.family.layer
    convert_layers(
        job,
        tokens,
        {},
        None,
        State(None),
        Store(place_of(Path(os.path.abspath(out))) if plan.file_bytes else None),
        Clock({}),
        last=fitting_layers(slots, job.num_layers, prefix) - 1,
        strict=strict,
        watch=lambda *_: None,
        group=group,
    )
    return group.hear()


def _check_places(job: Job, out: Path, keep: bool, more: int) -> None:
    """Refuse an OUT inside or around the model, and a disk too small for it and `more` bytes."""
    source = job.checkpoint.folder.resolve()
    place = out.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise MoefyError(f"OUT {out} lies inside MODEL {source}, or around it; move OUT", code=2)
    near = next(folder for folder in (place, *place.parents) if folder.exists())
    begun = place_of(place)
    # What a stopped run has written already is not needed again.
    needed = sum(slot.num_bytes for slot in write.slots(job).values()) - _used(begun)
    needed += more + (state_bytes(job) if keep else 0)
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


def check_weights(job: Job, watch: Watch) -> Scan:
    """Look at all values before any work, for what NaN makes a model write is no text either."""
    ffn = {name for layer in job.layers for name in job.family.ffn_names(layer)}
    return scan(job.checkpoint, ffn, partial(watch, "check weights"))


def _machine(job: Job, group: Group) -> dict[str, Any]:
    """The machine, and how many processes there are if several: either may decide bytes."""
    found = environment.machine(job.device)
    return {**found, "processes": group.size} if group.size > 1 else found


def _facts(job: Job, group: Group) -> dict[str, Any]:
    """What decides the bytes of the result, beside the model's files and the calibration tokens."""
    return {
        "moefy": environment.code(),
        "recipe": dataclasses.asdict(job.recipe),
        "shape": dataclasses.asdict(job.shape),
        "versions": environment.versions(),
        "machine": _machine(job, group),
    }


def _tokens(job: Job, state: State, watch: Watch, memory: int | None) -> packing.Tokens:
    """The calibration tokens; those that the model writes itself, which takes long, are kept."""
    if job.recipe.calibration != SELF:
        return calibration_tokens(job, watch)
    if found := state.load_tensors("tokens"):
        tensors, told = found
        return packing.Tokens(tensors["ids"], **{**told, "notes": tuple(told["notes"])})
    tokens = calibration_tokens(job, watch, memory=memory)
    told = {key: value for key, value in vars(tokens).items() if key != "ids_BT"}
    state.save_tensors("tokens", {"ids": tokens.ids_BT}, told)
    return tokens


def _gradients(job: Job, tokens: packing.Tokens, state: State, watch: Watch) -> dict[int, Tensor]:
    """The gradients that a partition asks for, which are kept."""
    if found := state.load_tensors("gradients"):
        return {int(layer): tensor for layer, tensor in found[0].items()}
    slopes = gradients(job, tokens, watch)
    state.save_tensors("gradients", {str(layer): slope for layer, slope in slopes.items()})
    return slopes
