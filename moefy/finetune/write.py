"""Write the checkpoint of a fine-tune, with the files, names and dtypes that `convert` wrote."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.reload import reopen
from moefy.checkpoint.validate import companion_files
from moefy.errors import MoefyError
from moefy.files.safetensors_header import CONFIG, Entry, read_entries, some
from moefy.files.shards import DTYPES, ShardWriter, Slot, read
from moefy.finetune.inputs import Run
from moefy.models.load import states_of

OF_RUN = (
    "moefy/recipe.toml", "moefy/conversion.json", "moefy/conversion.md",
    "moefy/calibration.safetensors",
)  # fmt: skip
"""Files of a run that are copied: the records of the conversion."""

SHADOW = "shadow_"
"""Begins the names of tensors that hold some of the experts' neurons again."""


def save(model: Any, place: Path) -> None:
    """Save the weights as transformers does. All processes must call it: each may have a part."""
    model.save_pretrained(place, save_original_format=True)


def write_checkpoint(place: Path, run: Run, part: Path) -> None:
    """Write the weights in `place` under the run's names, and copy the run's other files.

    config.json is copied, too: `save_pretrained` would drop keys that other engines and older
    versions read.

    Raises:
        MoefyError: code 6, for a weight that is missing, or not finite in the run's dtype.
    """
    entries = read_entries(run.folder)
    saved = read_entries(place)
    if missing := sorted(entries.keys() - saved.keys()):
        raise MoefyError(f"the trained model has lost {some(missing)}", code=6)
    writer = ShardWriter(part, {name: Slot(e.dtype, e.shape) for name, e in entries.items()})
    for name, entry in entries.items():
        trained = _trained(name, entries, saved).reshape(entry.shape)
        if torch.equal(trained, read(name, entry).to(trained.dtype)):
            writer.copy(name, entry)  # a tensor that training left alone keeps its bytes
            continue
        tensor = trained.to(DTYPES[entry.dtype])
        if not torch.isfinite(tensor).all():
            raise MoefyError(f"{name} is not finite after training; nothing written", code=6)
        writer.write(name, tensor)
    writer.finish()
    folder = run.folder
    records = [file for file in OF_RUN if (folder / file).is_file()]
    for file in [*companion_files(folder), CONFIG, *records]:
        (part / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / file, part / file)


def _trained(name: str, entries: Mapping[str, Entry], saved: Mapping[str, Entry]) -> Tensor:
    """A saved tensor; of a shadow, the first neurons of what its experts have become."""
    home, _, last = name.rpartition(".")
    if not last.startswith(SHADOW):
        return read(name, saved[name])
    whole = f"{home}.{last.removeprefix(SHADOW)}"
    width, kept = (entries[f"{home}.{prefix}down_proj"].shape[-1] for prefix in ("", SHADOW))
    tensor = read(whole, saved[whole])
    if last.endswith("down_proj"):
        return tensor[..., :kept]
    return tensor.unflatten(1, (-1, width))[:, :, :kept].flatten(1, 2)


def check_checkpoint(model: Any, run: Run, part: Path, ids_T: Tensor) -> dict[str, Any]:
    """Open the folder with plain transformers and compare it with the trained model.

    The model is then in float32.

    Raises:
        MoefyError: code 6 for keys or hidden states that differ from the trained model's.
    """
    model = model.float().eval().cpu()
    states: list[Tensor] = []
    for number in range(model.config.get_text_config().num_hidden_layers):
        layer = model.get_submodule(run.layer.format(layer=number).rstrip("."))
        layer.register_forward_hook(lambda _, args, out: states.append(states_of(out)[0].float()))
    with torch.inference_mode():
        model(input_ids=ids_T[None].cpu(), use_cache=False)
    return reopen(part, ids_T.cpu(), states, layer=run.layer)
