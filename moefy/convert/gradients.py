"""How the dense model's loss changes with what its FFNs write: from the model whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.tensors import Checkpoint
from moefy.errors import MoefyError
from moefy.models.families.family import Family
from moefy.models.load import open_model


def ffn_gradients(
    checkpoint: Checkpoint,
    family: Family,
    layers: list[int],
    ids_BT: Tensor,
    device: torch.device,
    watch: Callable[[int, int], None] = lambda *_: None,
) -> dict[int, Tensor]:
    """How the dense model's loss on the tokens changes with what each FFN writes, by layer.

    Of shape (B * T, D), in bfloat16, which has float32's range: only sizes matter. The loss is the
    mean over a sequence's next tokens.

    Memory: unlike all else here this needs the dense model whole, in float32, and one sequence's
    activations for the way back; the result is another 2 bytes * layers * B * T * D.

    Raises:
        MoefyError: code 6, when a loss is not finite.
    """
    model, _ = open_model(checkpoint.folder, dtype=torch.float32)
    model = model.to(device).eval().requires_grad_(False)
    gradients: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    # The weights need no gradient, so the embeddings are what starts the graph.
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.requires_grad_()
    )
    for layer, parts in gradients.items():
        block = model.get_submodule(family.layer.format(layer=layer) + family.block)
        block.register_forward_hook(partial(_keep_gradient, parts))
    for done, ids_T in enumerate(ids_BT.to(device), 1):
        loss = model(ids_T[None], labels=ids_T[None], use_cache=False).loss
        if not loss.isfinite():
            raise MoefyError(
                f"the dense model's loss on calibration sequence {done} is {float(loss)}; "
                "the weights or the dtype overflow",
                code=6,
            )
        loss.backward()
        watch(done, len(ids_BT))
    return {layer: torch.cat(parts) for layer, parts in gradients.items()}


def _keep_gradient(parts: list[Tensor], module: Any, args: Any, out: Tensor) -> None:
    width = out.shape[-1]  # some classes flatten sequences
    out.register_hook(lambda slope: parts.append(slope.reshape(-1, width).bfloat16().cpu()))
