"""The weights of a run before the refit of its `down_proj`, from its dense model."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.cut import without
from moefy.convert.forward import read_ffn
from moefy.convert.source import read_source
from moefy.errors import MoefyError
from moefy.files.safetensors_header import read_entries
from moefy.files.shards import read
from moefy.finetune.anneal import Start
from moefy.finetune.inputs import Run
from moefy.finetune.layout import Layout
from moefy.models import families, targets
from moefy.models.load import model_of, plain_config
from moefy.runs import folder as runs
from moefy.types import FFN, Shape


def layout_of(run: Run) -> Layout:
    """Where the run's class keeps the neurons of its FFNs."""
    summary = run.summary
    family = families.load(summary["family"])
    shape = summary["shape"]
    sizes = {f.name: shape[f.name] for f in dataclasses.fields(Shape) if f.name in shape}
    return Layout(targets.load(summary["target"], family), Shape(**sizes), family.gated)


def dense_folder(run: Run) -> Path:
    """The folder of the model that was converted, whoever the teacher is.

    Raises:
        MoefyError: code 3, where it is gone or another one.
    """
    return runs.dense_model(run.folder, run.summary, run.recipe, None, "the key model").folder


def start_of(run: Run) -> Start:
    """Where an annealed training of the run begins.

    Raises:
        MoefyError: code 3, where the dense model is gone or another one.
    """
    layout = layout_of(run)
    k = layout.shape.experts_per_token
    before = partial(unrefitted, run, dense_folder(run))
    return Start(before, layout.shape.num_experts, k, layout.gate)


def unrefitted(run: Run, dense: Path, model: Any) -> dict[str, Tensor]:
    """The parameters of the run's `model` that a refit has changed, by name, as they were before.

    `dense` is the folder of the dense model.

    Raises:
        MoefyError: code 4, where the run's neurons are not those of the dense model.
    """
    tensors = {name: read(name, entry) for name, entry in read_entries(run.folder).items()}
    state = tensors | _downs(run, dense, tensors)
    config = plain_config(run.folder)
    other = model_of(run.folder, config, state, task="ForCausalLM", dtype=model.dtype)
    before = dict(other.named_parameters())
    return {
        name: before[name].detach()
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.cpu(), before[name])
    }


def _downs(run: Run, dense: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of `down_proj` before the refit."""
    source = read_source(dataclasses.replace(run.recipe, model=str(dense), revision=None))
    checkpoint = without(source.checkpoint, source.family, run.summary.get("dropped_layers", []))
    layout, result = layout_of(run), {}
    for number in (figures["layer"] for figures in run.summary["layers"]):
        prefix = run.layer.format(layer=number)
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        gate_FD, up_FD = layout.read(own)
        ffn = read_ffn(checkpoint, source.family, number, torch.device("cpu"))
        place_F = _places(ffn, gate_FD, up_FD)
        if place_F is None:
            raise MoefyError(
                f"anneal: layer {number} of {run.folder} has neurons that the dense model has "
                "not; expected a run as `moefy convert` wrote it, or anneal=0",
                code=4,
            )
        before = layout.write(ffn.some(place_F), up_FD.dtype)
        result |= {prefix + name: tensor for name, tensor in before.items()}
    return result


def _places(ffn: FFN, gate_FD: Tensor, up_FD: Tensor) -> Tensor | None:
    """Which neurons of the dense `ffn` the rows are; None where they are others.

    Neurons of equal rows answer alike: which of them is where changes nothing while all are on.
    """
    gate = ffn.gate_FD if ffn.gate_FD is not None else ffn.up_FD[:, :0]
    places: dict[bytes, list[int]] = defaultdict(list)
    for neuron, key in enumerate(_keys(gate.to(up_FD.dtype), ffn.up_FD.to(up_FD.dtype))):
        places[key].append(neuron)
    result = [places[key].pop() if places[key] else None for key in _keys(gate_FD, up_FD)]
    return None if None in result else torch.tensor(result)


def _keys(gate_FD: Tensor, up_FD: Tensor) -> list[bytes]:
    """The bytes of each neuron's rows."""
    both = torch.cat([gate_FD, up_FD], 1).contiguous()
    return [row.tobytes() for row in both.view(torch.uint8).numpy()]
