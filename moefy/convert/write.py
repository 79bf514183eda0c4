"""The tensors and files of the checkpoint that a conversion writes."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moefy.checkpoint.validate import companion_files
from moefy.convert.ffn import Block
from moefy.convert.prepare import Job
from moefy.errors import MoefyError
from moefy.files.publish import write_json
from moefy.files.shards import CODES, DTYPES, ShardWriter, Slot
from moefy.models.targets.target import Dense, Split
from moefy.progress import Watch
from moefy.types import FFN, Partition, Router


def slots(job: Job) -> dict[str, Slot]:
    """Every tensor of the output, in an order that does not depend on the input's shards."""
    table = _slots(job)
    table.update({name: slot for name, (slot, _) in _added(job, table).items()})
    return {job.target.prefix + name: slot for name, slot in table.items()}


def _slots(job: Job) -> dict[str, Slot]:
    """What is made of the dense checkpoint's tensors, under names less the target's prefix."""
    ffn_of, block = job.ffn_names, _block_slots(job)
    table: dict[str, Slot] = {}
    for name, entry in sorted(job.checkpoint.entries.items()):
        layer = ffn_of.get(name)
        if layer is None:
            for new, tensor in _rest(job, name, torch.empty(entry.shape, device="meta")).items():
                table[new] = Slot(_stored(job, entry.dtype), tuple(tensor.shape))
            continue
        prefix = job.family.layer.format(layer=layer)
        table.update({prefix + tail: slot for tail, slot in block.items()})
    return table


def _block_slots(job: Job) -> dict[str, Slot]:
    """Tensors of one converted FFN, from shapes alone."""
    shape, hidden, family = job.shape, job.size("hidden_size"), job.family
    num_shared = shape.num_active if job.method.fit is None else shape.num_shared
    with torch.device("meta"):
        matrix_FD = torch.empty(shape.num_neurons, hidden)
        ffn = FFN(
            matrix_FD if family.gated else None,
            matrix_FD,
            torch.empty(hidden, shape.num_neurons),
            bias_F=torch.empty(shape.num_neurons) if family.biased else None,
        )
        partition = Partition(
            torch.empty(num_shared, dtype=torch.long),
            torch.empty(shape.num_experts, shape.expert_width, dtype=torch.long),
        )
        k, slices = shape.experts_per_token, shape.granularity
        split = Split(ffn, partition, _router(job), k, job.dtype, slices, job.num_shadow)
        tensors = job.target.tensors(split)
    return {name: Slot(CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def _router(job: Job) -> Router:
    """A router of the job's sizes, whose numbers mean nothing."""
    experts, hidden, sizes = job.shape.num_experts, job.size("hidden_size"), job.method.router_sizes
    units, positions = sizes.get("router_units"), sizes.get("router_positions")
    return Router(
        torch.empty(experts, hidden),
        hidden_HD=torch.empty(units, hidden) if units else None,
        output_EH=torch.empty(experts, units) if units else None,
        position_PE=torch.empty(positions, experts) if positions else None,
    )


def _stored(job: Job, code: str) -> str:
    """The dtype code that a copied tensor is written in."""
    cast = job.recipe.dtype != "as-stored" and DTYPES[code].is_floating_point
    return CODES[getattr(torch, job.recipe.dtype)] if cast else code


def _added(job: Job, table: Mapping[str, Slot]) -> dict[str, tuple[Slot, str | None]]:
    """Tensors that `table` lacks: (slot, name to copy from; None for zeros)."""
    if job.method.fit is None:
        return {}
    added: dict[str, tuple[Slot, str | None]] = {}
    entries, family = job.checkpoint.entries, job.family
    if job.dense.tied and not job.target.ties:
        # Several engines cannot load these classes with a tied head.
        entry = entries[family.embedding]
        added[family.head] = (Slot(_stored(job, entry.dtype), entry.shape), family.embedding)
    for layer in range(job.num_layers):
        for part in job.target.biases(job.dense):
            if part not in job.dense.biases:
                name = family.layer.format(layer=layer) + f"self_attn.{part}_proj."
                weight = table[name + "weight"]
                slot = Slot(weight.dtype, weight.shape[:1])
                added[name + "bias"] = (slot, None)
    return added


def _rest(job: Job, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What is written for a tensor that is no converted FFN."""
    if job.target.native or job.family.rest is None:
        return {name: tensor}
    return job.family.rest(job.dense.own, name, tensor)


def copy(job: Job, writer: ShardWriter, watch: Watch) -> None:
    """Write everything that is no converted FFN: byte for byte, unless another dtype is asked."""
    added, ffn_of = _added(job, _slots(job)), job.ffn_names
    work = {name: name for name in job.checkpoint.entries if name not in ffn_of}
    heads = {name: origin for name, (_, origin) in added.items() if origin}
    for done, (name, origin) in enumerate([*work.items(), *heads.items()], 1):
        entry = job.checkpoint.entries[origin]
        dtype, shaped = DTYPES[_stored(job, entry.dtype)], torch.empty(entry.shape, device="meta")
        whole = {name: shaped} if name in heads else _rest(job, name, shaped)
        if DTYPES[entry.dtype] == dtype and all(value is shaped for value in whole.values()):
            for new in whole:
                writer.copy(job.target.prefix + new, entry)
        else:  # the largest tensor of a model is read only where it must be
            tensor = job.checkpoint.tensor(origin)
            written = {name: tensor} if name in heads else _rest(job, name, tensor)
            for new, value in written.items():
                writer.write(job.target.prefix + new, value.to(dtype).contiguous())
        watch("copy", done, len(work) + len(heads))
    for name, (slot, origin) in added.items():
        if origin is None:
            writer.write(
                job.target.prefix + name, torch.zeros(slot.shape, dtype=DTYPES[slot.dtype])
            )


def block_tensors(job: Job, layer: int, block: Block) -> dict[str, Tensor]:
    """One converted FFN in the target's names and dtype, in the machine's memory.

    Raises:
        MoefyError: code 6, when a rescaled weight is not finite in that dtype.
    """
    prefix = job.target.prefix + job.family.layer.format(layer=layer)
    routed, k, slices = block.routed, job.shape.experts_per_token, job.shape.granularity
    parts = routed.ffn, routed.partition, routed.router
    split = Split(*parts, k, job.dtype, slices, job.num_shadow)
    tensors = {}
    for tail, tensor in job.target.tensors(split).items():
        if not torch.isfinite(tensor).all():
            raise MoefyError(
                f"{prefix}{tail} overflows {job.dtype}; use --dtype bfloat16 or float32", code=6
            )
        tensors[prefix + tail] = tensor.cpu()
    return tensors


def write_folder(job: Job, part: Path) -> None:
    """Configuration, tokenizer files byte for byte, and the generation defaults."""
    dense = job.dense
    if job.method.fit is None:
        dense = Dense(job.family, job.checkpoint.config)
    config = job.target.configuration(dense, job.shape)
    if job.num_shadow:
        config["num_shadow"] = job.num_shadow
    config |= job.method.router_sizes
    config["dtype"] = str(job.dtype).removeprefix("torch.")
    config["transformers_version"] = importlib.import_module("transformers").__version__
    folder = job.checkpoint.folder
    for file in companion_files(folder):
        (part / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / file, part / file)
    write_json(part / "config.json", config)
