"""Turn a dense checkpoint into a stock MoE checkpoint, one layer at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy import environment
from moefy.checkpoint.check_finite import scan
from moefy.checkpoint.reload import fitting_layers, reopen
from moefy.config.recipe import num_bytes
from moefy.convert import depth, disk, sensitivity, write
from moefy.convert.calibration import calibration_tokens
from moefy.convert.estimate import budget as affordable
from moefy.convert.estimate import with_tokens
from moefy.convert.gradients import ffn_gradients
from moefy.convert.layers import convert_layers, shared
from moefy.convert.memory import (
    ADVICE,
    Plan,
    fit,
    gradient_bytes,
)
from moefy.convert.oracle import attach
from moefy.convert.prepare import SELF, Job
from moefy.convert.probe import speeds
from moefy.convert.session import Attempt, Budget, Session
from moefy.convert.summary import END, gaps, summarise, write_report
from moefy.distributed import Group
from moefy.errors import MoefyError
from moefy.files.publish import STATE, place_of, publishing
from moefy.files.resume import State
from moefy.files.shards import ShardWriter, Slot
from moefy.memory import require
from moefy.progress import Watch
from moefy.text import packing
from moefy.timing import Clock

ONCE = Attempt()


def convert(
    job: Job,
    out: Path,
    attempt: Attempt = ONCE,
    *,
    tokens: packing.Tokens | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Run a prepared conversion and publish the folder `out` whole; return its report.

    A conversion that was stopped goes on behind the last layer that it finished, and ends with the
    bytes it would have had. `tokens` are used instead of those that the recipe names, when given.
    The processes of a group share the calibration tokens; the first one does all else, and writes.

    Raises:
        MoefyError: code 2 for a partition that several processes cannot share, 3 for bad weights or
            calibration text, 5 for what cannot be written or takes more memory even so, 6 for a
            result that is not finite or not what the reopened folder computes, and if `strict` for
            too little text, 7 for an unfinished conversion of another kind, or a damaged one.
    """
    group = attempt.group
    _, _, number = job.recipe.device.partition(":")
    if group.size > 1 and number:
        raise MoefyError(
            f"--device is {job.recipe.device!r} for {group.size} processes; expected auto, cpu or "
            "cuda, by which each has a GPU of its own",
            code=2,
        )
    if job.recipe.minutes is not None:
        budget = group.broadcast_object(None if group.rank else _budget(job, out, attempt))
        job = with_tokens(job, budget.tokens)
        attempt = dataclasses.replace(attempt, budget=budget)
    plan = fit(job, write.slots(job), attempt.memory)
    if plan.refusal:
        raise MoefyError(plan.refusal, code=5)
    if group.size > 1 and (job.method.gradient or job.method.polish):
        named = f"--partition {job.recipe.partition} takes gradients of all tokens in one process"
        named = named if job.method.gradient else "--polish trains on all tokens in one process"
        raise MoefyError(f"{named}; start one, or use another", code=2)
    shared(group, job.recipe.tokens // job.recipe.sequence_length, job.recipe.sequence_length)
    if group.rank:
        return _help(job, out, plan, attempt)
    _check_places(job, out, disk.needed(job, write.slots(job), plan, keep=attempt.keep))
    with publishing(out, force=attempt.force, resume=attempt.keep, restart=attempt.restart) as part:
        state = State(part.with_name(STATE) if attempt.keep else None)
        state.claim(_facts(job, group), force=attempt.force)
        if attempt.budget:
            state.save("budget", dataclasses.asdict(attempt.budget))
        store = plan.place.store(part.parent, job.device)
        clock = Clock(state.load("seconds") or {})
        summary = _lead(Session(job, attempt, state, store, clock, watch), part, tokens, plan)
    return group.broadcast_object(summary)


def _lead(
    session: Session, part: Path, tokens: packing.Tokens | None, plan: Plan
) -> dict[str, Any]:
    """Do what the first process does: write the folder `part` whole. Gives the report."""
    job, state, clock, force = session.job, session.state, session.clock, session.attempt.force
    with clock.stage("check weights"):
        # This comes first: a model with NaN writes no text either.
        scanned = scan(job.checkpoint, job.ffn_names, partial(session.watch, "check weights"))
    state.claim({"inputs": scanned.digests}, force=force)
    with clock.stage("calibration text"):
        tokens = tokens or _tokens(session)
    state.claim({"calibration": tokens.sha256}, force=force)
    order = _dropped(session, tokens)
    session = dataclasses.replace(session, job=depth.settle(job, order))
    savings = _savings(session, tokens)
    asked = session.job.active
    job = sensitivity.settle(session.job, savings) if savings else session.job
    session = dataclasses.replace(session, job=job)
    session.attempt.group.broadcast_object((tokens, order, savings))
    slots = write.slots(job)
    size = num_bytes(job.recipe.max_shard_size)
    writer = ShardWriter(part, slots, shard_bytes=size, resume=True)
    with clock.stage("copy"):
        copied = state.load("copied")
        if copied is None or not writer.keep(copied):
            write.copy(job, writer, session.watch)
            state.save("copied", writer.sync(writer.digests))
    slopes = _gradients(session, tokens)
    with clock.stage("layers"):
        done = convert_layers(session, tokens, slopes, writer, _last(job, slots))
    with clock.stage("write"):
        writer.finish()
        write.write_folder(job, part)
    with clock.stage("reopen"):
        checked = reopen(
            part,
            tokens.ids_BT[-1],
            done.ends,
            layer=job.target.prefix + job.family.layer,
            task=job.task,
            prepare=lambda model: attach(model, done.norms),
        )
    budget = session.attempt.budget
    notes = [*job.notes, *([budget.note] if budget else []), *scanned.notes, *gaps(done.figures)]
    job = dataclasses.replace(job, notes=tuple(notes))
    summary = summarise(job, tokens, done.figures, checked, clock.seconds(), scanned.digests)
    summary["machine"] = _machine(job, session.attempt.group)
    summary["memory"] = {"planned_bytes": plan.peak_bytes, "file_bytes": plan.file_bytes}
    summary["dropped"] = order
    summary["minutes"] = budget.minutes if budget else None
    if savings:
        summary["budget"] = {
            "active": asked,
            "kl_when_all_are_pruned": savings.kl,
            "kl_saved_if_dense": savings.saved_L,
        }
    extra = {"ids": tokens.ids_BT.int()}
    if (end_TD := done.ends[checked["layers"] - 1]) is not None:
        extra[END] = end_TD
    extra |= {f"norm.{layer}": norm for layer, norm in done.norms.items()}
    write_report(job, part, summary, extra)
    return summary


def _budget(job: Job, out: Path, attempt: Attempt) -> Budget:
    """What `--minutes` comes to: what a stopped run has found, if this one would go on with it."""
    place = place_of(Path(os.path.abspath(out)))
    state = State(place / STATE if attempt.keep and not attempt.restart else None)
    if record := state.load("budget"):
        budget = Budget(**record)
        same = not state.differences(_facts(with_tokens(job, budget.tokens), attempt.group))
        if same and budget.minutes == job.recipe.minutes:
            return budget
    rates = speeds(job.device, job.shape)
    return affordable(job, rates, attempt.memory, disk.room(out), keep=attempt.keep)


def _help(job: Job, out: Path, plan: Plan, attempt: Attempt) -> dict[str, Any]:
    """Do what all processes do: convert the layers. Gives what the first one reports."""
    tokens, order, savings = attempt.group.broadcast_object()
    job = depth.settle(job, order)
    if savings:
        job = sensitivity.settle(job, savings)
    store = plan.place.store(place_of(Path(os.path.abspath(out))), job.device)
    session = Session(job, attempt, State(None), store, Clock({}), lambda *_: None)
    convert_layers(session, tokens, {}, None, _last(job, write.slots(job)))
    return attempt.group.broadcast_object()


def _last(job: Job, slots: Mapping[str, Slot]) -> int:
    """The last of the layers that are reopened."""
    layers, _ = fitting_layers(slots, job.num_layers, job.target.prefix + job.family.layer)
    return layers - 1


def _check_places(job: Job, out: Path, needed: int) -> None:
    """Refuse an OUT inside or around the model, and a disk too small for so many bytes."""
    source = job.checkpoint.folder.resolve()
    place = out.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise MoefyError(f"OUT {out} lies inside MODEL {source}, or around it; move OUT", code=2)
    room, begun = disk.room(out), place_of(place)
    if room < needed:
        others = [folder for folder in begun.parent.glob(".*.moefy-part") if folder != begun]
        held = ", ".join(f"{folder.name} ({disk.used(folder) / 1e9:.1f} GB)" for folder in others)
        held = f" (unfinished runs are there: {held})" if held else ""
        raise MoefyError(
            f"{place.parent} has {room / 1e9:.1f} GB free; the result and what is kept until it is "
            f"whole need {needed / 1e9:.1f} GB; free some or choose another OUT{held}",
            code=5,
        )


def _machine(job: Job, group: Group) -> dict[str, Any]:
    """The machine, and the number of processes if there are several: both may decide bytes."""
    facts = environment.machine(job.device)
    return {**facts, "processes": group.size} if group.size > 1 else facts


def _facts(job: Job, group: Group) -> dict[str, Any]:
    """What decides the bytes of the result, beside the model's files and the calibration tokens."""
    # By its own name, for a rerun may name the device that `auto` chose.
    recipe = dataclasses.replace(job.recipe, device=str(job.device))
    return {
        "moefy": environment.code(),
        "recipe": dataclasses.asdict(recipe),
        "shape": dataclasses.asdict(job.shape),
        "versions": environment.versions(),
        "machine": _machine(job, group),
    }


def _tokens(session: Session) -> packing.Tokens:
    """The calibration tokens. Text that the model writes takes long, so its tokens are kept."""
    job, state = session.job, session.state
    if job.recipe.calibration != SELF:
        return calibration_tokens(job, session.watch)
    if record := state.load_tensors("tokens"):
        tensors, facts = record
        return packing.Tokens(tensors["ids"], **{**facts, "notes": tuple(facts["notes"])})
    tokens = calibration_tokens(job, session.watch, memory=session.attempt.memory)
    facts = {key: value for key, value in vars(tokens).items() if key != "ids_BT"}
    state.save_tensors("tokens", {"ids": tokens.ids_BT}, facts)
    return tokens


def _dropped(session: Session, tokens: packing.Tokens) -> list[dict[str, Any]]:
    """The layers to drop that the recipe wants chosen, in order, with their losses; kept."""
    with session.clock.stage("layers to drop"):
        order = session.state.load("dropped") or depth.chosen(session.job, tokens, session.watch)
        if order:  # a stopped run that has nothing to keep leaves nothing
            session.state.save("dropped", order)
    return order


def _savings(session: Session, tokens: packing.Tokens) -> sensitivity.Savings | None:
    """What leaving each layer dense would save, where the recipe asks for that; it is kept."""
    if not session.job.weighs:
        return None
    with session.clock.stage("sensitivity"):
        if record := session.state.load("savings"):
            return sensitivity.Savings(**record)
        savings = sensitivity.savings(session.job, tokens, session.watch)
        session.state.save("savings", dataclasses.asdict(savings))
    return savings


def _gradients(session: Session, tokens: packing.Tokens) -> dict[int, Tensor]:
    """The gradients that a partition asks for, by layer; they are kept.

    Raises:
        MoefyError: code 5 where the model does not fit in memory whole, in float32.
    """
    job = session.job
    if not job.method.gradient:
        return {}
    with session.clock.stage("gradients"):
        if record := session.state.load_tensors("gradients"):
            return {int(layer): tensor for layer, tensor in record[0].items()}
        ids_BT = tokens.ids_BT[: -tokens.num_heldout]
        needed = 4 * job.num_weights + gradient_bytes(job)
        require(needed, "a model that gives gradients", ADVICE["gradients"])
        show = partial(session.watch, "gradients")
        slopes = ffn_gradients(job.checkpoint, job.family, job.layers, ids_BT, job.device, show)
        tensors = {str(layer): slope for layer, slope in slopes.items()}
        session.state.save_tensors("gradients", tensors)
    return slopes
