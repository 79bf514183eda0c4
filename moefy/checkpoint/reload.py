"""Open a written folder with plain transformers, as any user would, and check its hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.files.safetensors_header import Entry, read_header
from moefy.files.shards import Slot
from moefy.models.load import open_model, plain_config, runnable, some_layers, states_of

TOLERANCE = 0.1
"""Greatest mean relative error of a token's last hidden state. Router gates deviate from one by
0.1 %, and near-ties between experts may be decided otherwise; a wrong gate gives over 0.3."""

MEMORY = 3 * 10**9
"""Most bytes of weights to reopen: all layers of a small model, or the first of a large one."""


def reopen(
    folder: Path,
    ids_T: Tensor,
    ends: Sequence[Tensor | None],
    *,
    layer: str = "model.layers.{layer}.",
    task: str = "ForCausalLM",
    prepare: Callable[[Any], Any] = lambda model: model,
) -> dict[str, Any]:
    """Load `folder` with its stock class and compare hidden states with those of the conversion.

    `ends[l]` holds the output states (T, D) of layer l on the sequence `ids_T`, if they are known.
    As many layers are loaded as fit in `MEMORY`. `layer` is the prefix of a layer's names, `task`
    the task of the model. `prepare` may put a router that cannot be written into the loaded model.

    Raises:
        MoefyError: code 6, for missing, unexpected or mismatched keys, or other hidden states.
    """
    config = plain_config(folder, code=6)
    entries = {
        name: entry
        for file in folder.glob("*.safetensors")
        for name, entry in read_header(file).items()
    }
    layers, in_float32 = fitting_layers(entries, len(ends), layer)
    if layers < len(ends):
        config = some_layers(config, range(layers))
    model, info = open_model(
        folder,
        task=task,
        config=config,
        code=6,
        dtype=torch.float32 if in_float32 else "auto",
        ignore_mismatched_sizes=True,  # `info` lists them, and they are refused below
    )
    later = tuple(layer.format(layer=number) for number in range(layers, len(ends)))
    wrong = {
        kind: names
        for kind, keys in info.items()
        if (names := [str(key) for key in keys if not str(key).startswith(later)])
    }
    if wrong:
        raise MoefyError(f"the written folder does not load cleanly: {wrong}", code=6)
    seen: list[Tensor] = []
    home = layer if hasattr(model, layer.split(".")[0]) else layer.partition(".")[2]
    last = model.get_submodule(home.format(layer=layers - 1).rstrip("."))
    last.register_forward_hook(lambda module, args, out: seen.append(states_of(out)))
    ids_1T = ids_T[None]
    more = {"ForCausalLM": {"logits_to_keep": 1}, "ForSeq2SeqLM": {"decoder_input_ids": ids_1T}}
    with torch.inference_mode():
        prepare(runnable(model.eval()))(ids_1T, **more.get(task, {}))
    found_TD, end_TD, error = seen[0][0].float(), ends[layers - 1], None
    if end_TD is not None:
        # Mean over tokens: in one norm, a few tokens with huge states would hide the others.
        wrong_T = (found_TD - end_TD.cpu()).norm(dim=1) / end_TD.cpu().norm(dim=1)
        error = float(wrong_T.mean())
    if not found_TD.isfinite().all() or not (error is None or error <= TOLERANCE):
        raise MoefyError(
            f"the written folder computes other hidden states than the conversion did "
            f"(relative error {error or float('nan'):.3g}, expected at most {TOLERANCE})",
            code=6,
        )
    return {
        "class": type(model).__name__,
        "layers": layers,
        "hidden_state_error": error,
        "prefix": layer,
    }


def fitting_layers(
    slots: Mapping[str, Slot | Entry], num_layers: int, layer: str
) -> tuple[int, bool]:
    """Number of layers that `reopen` loads, and whether in float32.

    As many as fit in `MEMORY` in float32, because a CPU may compute hundreds of times slower in the
    stored dtype. Where not even one fits, beside large embeddings, one is loaded as stored.
    """
    for loaded in range(num_layers, 0, -1):
        later = tuple(layer.format(layer=number) for number in range(loaded, num_layers))
        counts = (math.prod(s.shape) for name, s in slots.items() if not name.startswith(later))
        if 4 * sum(counts) <= MEMORY:
            return loaded, True
    return 1, False
