"""Turn a dense checkpoint into a stock MoE checkpoint, one layer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy import __version__, budget, data, output, report, walk
from moefy.block import Block, convert_block
from moefy.coverage import gaps
from moefy.errors import MoefyError
from moefy.job import Job, Watch
from moefy.oracle import attach
from moefy.publish import publishing, sha256, write_json, write_text
from moefy.recipe import render, shard_bytes
from moefy.reopen import reopen
from moefy.scan import Scan, scan
from moefy.shards import CODES, ShardWriter, Slot
from moefy.source import DEMO


def convert(
    job: Job,
    out: Path,
    *,
    force: bool = False,
    strict: bool = False,
    tokens: data.Tokens | None = None,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Run a prepared conversion and publish the folder `out` whole; return its report.

    `tokens` are used instead of those that the recipe names, when given. With `strict` it fails at
    the first layer of which an expert or a neuron has seen too little text (see `coverage`).

    Raises:
        MoefyError: code 3 for bad weights or calibration text, 5 for what cannot be written, 6 for
            a result that is not finite or not what the reopened folder computes, and if `strict`
            for too little text.
    """
    _check_places(job, out)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    with _timed(seconds, "check weights"):
        scanned = check_weights(job, watch)
    with publishing(out, force=force) as part:
        with _timed(seconds, "calibration text"):
            tokens = tokens or calibration_tokens(job, watch)
        loss_L: list[float] = []
        asked = job.recipe.active
        if job.recipe.layers == budget.AUTO:
            with _timed(seconds, "sensitivity"):
                job, loss_L = budget.settle(job, tokens, watch)
        size = shard_bytes(job.recipe.max_shard_size)
        writer = ShardWriter(part, output.slots(job), shard_bytes=size)
        with _timed(seconds, "copy"):
            output.copy(job, writer, watch)
        gradients = {}
        if job.method.gradient:
            with _timed(seconds, "gradients"):
                gradients = _gradients(job, tokens, watch)
        ends, figures, norms = [], [], {}
        # With a refit against drift, the dense model's states go along behind the converted one's.
        ids_BT = torch.cat([tokens.ids_BT] * (2 if job.method.drift else 1))
        states_BTD = walk.embed(job.checkpoint, job.family, ids_BT, job.device)
        with _timed(seconds, "layers"):
            for layer, block in _walk(job, states_BTD, tokens, gradients, watch):
                if isinstance(block, Block):
                    output.write_block(job, writer, layer, block)
                    figures.append({"layer": layer, **block.figures})
                    if strict and (found := gaps(figures[-1:])):
                        raise MoefyError(f"--strict: {found[0]}", code=6)
                    if block.router.norm_EN is not None:
                        norms[layer] = block.router.norm_EN
                ends.append(states_BTD[len(tokens.ids_BT) - 1].clone())
                watch("layers", layer + 1, job.num_layers)
        with _timed(seconds, "write"):
            writer.finish()
            output.write_folder(job, part)
        with _timed(seconds, "reopen"):
            checked = reopen(
                part,
                tokens.ids_BT[-1],
                ends,
                layer=job.target.prefix + job.family.layer,
                task=job.task,
                prepare=lambda model: attach(model, norms),
            )
        job = dataclasses.replace(job, notes=(*job.notes, *scanned.notes, *gaps(figures)))
        summary = _summary(job, tokens, figures, checked, seconds, started, scanned.digests)
        if loss_L:
            summary["budget"] = {"active": asked, "kl_when_pruned_alone": loss_L}
        extra = {"ids": tokens.ids_BT.int(), **{f"norm.{n}": norm for n, norm in norms.items()}}
        _write_report(job, part, summary, extra)
    return summary


def _check_places(job: Job, out: Path) -> None:
    """Refuse an OUT inside or around the model, and a disk that is too small."""
    source = job.checkpoint.folder.resolve()
    place = out.resolve()
    if place == source or source in place.parents or place in source.parents:
        raise MoefyError(f"OUT {out} lies inside MODEL {source}, or around it; move OUT", code=2)
    near = next(folder for folder in (place, *place.parents) if folder.exists())
    needed = sum(slot.num_bytes for slot in output.slots(job).values())
    free = shutil.disk_usage(near).free
    if free < 1.1 * needed:
        raise MoefyError(
            f"{near} has {free / 1e9:.1f} GB free; the result needs {1.1 * needed / 1e9:.1f} GB; "
            "free some or choose another OUT",
            code=5,
        )


def check_weights(job: Job, watch: Watch) -> Scan:
    """Look at all values before any work, for what NaN makes a model write is no text either."""
    ffn = {name for layer in job.layers for name in job.family.ffn_names(layer)}
    return scan(job.checkpoint, ffn, partial(watch, "check weights"))


def calibration_tokens(job: Job, watch: Watch) -> data.Tokens:
    """The calibration tokens, from text or from the model itself.

    Raises:
        MoefyError: code 5 where the model must write but does not fit in memory whole.
    """
    from transformers import AutoModelForCausalLM

    recipe, folder = job.recipe, job.checkpoint.folder
    size = job.size("vocab_size")
    shape = {"num_tokens": recipe.tokens, "length": recipe.sequence_length, "seed": recipe.seed}
    if recipe.calibration != "self" and recipe.text_field == data.IDS:
        return data.load_ids(recipe.calibration, vocab_size=size, **shape)
    tokenizer = data.load_tokenizer(folder)
    notes = data.vocabulary_notes(tokenizer, size)
    if recipe.calibration != "self":
        tokens = data.load(
            tokenizer, recipe.calibration, text_field=recipe.text_field, vocab_size=size, **shape
        )
        return dataclasses.replace(tokens, notes=(*notes, *tokens.notes))
    weights = sum(entry.stop - entry.start for entry in job.checkpoint.entries.values())
    _check_memory(weights, "to write its own calibration text", "give a text as --calibration")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    model = model.to(job.device).eval()
    tokens = data.sample(model, tokenizer, progress=partial(watch, "calibration text"), **shape)
    return dataclasses.replace(tokens, notes=tuple(notes))


def _gradients(job: Job, tokens: data.Tokens, watch: Watch) -> dict[int, Tensor]:
    """How the dense model's loss changes with what each FFN writes, for a partition that asks.

    Raises:
        MoefyError: code 5 where the model does not fit in memory whole, in float32.
    """
    ids_BT = tokens.ids_BT[: -tokens.num_heldout]
    weights = sum(entry.num_elements for entry in job.checkpoint.entries.values())
    kept = len(job.layers) * ids_BT.numel() * job.size("hidden_size")
    _check_memory(4 * weights + 2 * kept, "to give gradients", "use another --partition")
    return walk.gradients(
        job.checkpoint, job.family, job.layers, ids_BT, job.device, partial(watch, "gradients")
    )


def _check_memory(needed: int, what_for: str, instead: str) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * memory:
        raise MoefyError(
            f"{what_for} the model must be in memory whole: {needed / 1e9:.1f} GB of "
            f"{memory / 1e9:.1f} GB; {instead}",
            code=5,
        )


def _walk(
    job: Job,
    states_BTD: Tensor,
    tokens: data.Tokens,
    gradients: dict[int, Tensor],
    watch: Watch,
) -> Iterator[tuple[int, Block | None]]:
    """Yield each layer's converted block (None where dense), having moved the states past it.

    The first sequences of `states_BTD` are those of `tokens`; any others go through the dense FFNs.
    """
    config = walk.model_config(job.checkpoint)
    activation = getattr(config, job.family.activation, "silu")
    num_tokens, heldout = tokens.ids_BT.numel(), tokens.num_heldout * tokens.ids_BT.shape[1]
    for layer in range(job.num_layers):
        watch(f"layer {layer}: attention", layer, job.num_layers)
        ffn = walk.read_ffn(job.checkpoint, job.family, layer, activation, job.device)
        x_TD, join, leave = walk.tap(job.checkpoint, job.family, config, layer, states_BTD)
        _check_states(x_TD, layer)
        flat_TD = states_BTD.view(x_TD.shape)
        converted = layer in job.layers
        for first in range(num_tokens if converted else 0, len(x_TD), 2048):
            part = slice(first, first + 2048)
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
            gradient_TD=gradients.pop(layer, None),
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


def _summary(
    job: Job,
    tokens: data.Tokens,
    layers: list[dict[str, Any]],
    checked: dict[str, Any],
    seconds: dict[str, float],
    started: float,
    inputs: dict[str, str],
) -> dict[str, Any]:
    """What `moefy/conversion.json` holds, less the digests of the output."""
    entries = job.checkpoint.entries
    local = job.recipe.model == DEMO or Path(job.recipe.model).expanduser().is_dir()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "moefy": __version__,
        "model": job.recipe.model,
        "hub_id": None if local else job.recipe.model,
        "family": job.family.model_type,
        "task": job.task,
        "target": job.target.model_type,
        "target_reason": job.reason,
        "licence": licence(job.checkpoint.folder),
        "engines": list(job.target.engines),
        "shape": {**dataclasses.asdict(job.shape), "active_fraction": job.shape.active_fraction},
        "parameters_dense": sum(entry.num_elements for entry in entries.values()),
        "layers": layers,
        "layers_left_dense": [n for n in range(job.num_layers) if n not in job.layers],
        "recipe": dataclasses.asdict(job.recipe),
        "calibration": {
            "source": tokens.source,
            "sha256": tokens.sha256,
            "documents": tokens.num_documents,
            "sequences": len(tokens.ids_BT),
            "heldout_sequences": tokens.num_heldout,
            "sequence_length": tokens.ids_BT.shape[1],
            "notes": list(tokens.notes),
        },
        "reopened": checked,
        "notes": list(job.notes),
        "seconds": {
            **{name: round(value, 2) for name, value in seconds.items()},
            "total": round(time.perf_counter() - started, 2),
        },
        "peak_resident_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "device": str(job.device),
        "versions": {
            "python": platform.python_version(),
            **{
                name: _version(name) for name in ("torch", "transformers", "safetensors", "sklearn")
            },
        },
        "inputs": inputs,
    }


def _write_report(
    job: Job, part: Path, summary: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Recipe, calibration tokens, pages and report; the report's existence means whole."""
    folder = part / "moefy"
    folder.mkdir()
    slots = {name: Slot(CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    writer = ShardWriter(folder, slots, name="calibration")
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    made = {"moefy": summary["moefy"], **summary["versions"]}
    text = render(job.recipe, made=made, inputs=summary["inputs"])
    write_text(folder / "recipe.toml", text)
    summary["outputs"] = _digests(part, set(part.glob("*.safetensors")))
    write_text(folder / "conversion.md", report.conversion_page(summary))
    write_text(part / "README.md", report.model_card(summary))
    write_json(folder / "conversion.json", summary)


LICENCE = ("license", "license_name", "license_link", "language")
"""What a card inherits from that of the dense model."""


def licence(folder: Path) -> dict[str, Any]:
    """The licence and the languages that the dense model's card names, if it has a card."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    card = folder / "README.md"
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(100_000)
    try:
        told = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # a card is for people: a model is no worse for a broken one
        return {}
    return {key: told[key] for key in LICENCE if isinstance(told.get(key), str | list)}


def _digests(folder: Path, files: set[Path]) -> dict[str, str]:
    named = {file.name: sha256(file) for file in sorted(files)}
    named["config.json"] = sha256(folder / "config.json")
    return named


def _version(name: str) -> str:
    return str(importlib.import_module(name).__version__)


@contextlib.contextmanager
def _timed(table: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds that the block takes."""
    start = time.perf_counter()
    yield
    table[name] = time.perf_counter() - start
