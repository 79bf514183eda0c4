"""A dense model's logits on some windows of text, computed once and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from moefy.compute import name_of
from moefy.evaluate.candidates import load_model


def remembered(
    folder: Path, file: Path, windows: list[Tensor], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """A function from a window (T,) to the dense model's log-probabilities on it, (T - 1, V).

    Its logits are kept in a file named after `file` and `dtype`, which it computes them in.
    """
    file = file.with_stem(f"{file.stem}-{name_of(dtype)}")
    if not file.exists():
        dense = load_model(folder, dtype)
        with torch.inference_mode():
            kept = [dense(w[None], use_cache=False).logits[0, :-1].clone() for w in windows]
        # Whole or not at all: others may work in the same folder.
        part = file.with_name(f".{file.name}.{os.getpid()}")
        torch.save(kept, part)
        part.replace(file)
    logits = dict(zip(map(id, windows), torch.load(file, mmap=True), strict=True))

    def log_probabilities(ids_T: Tensor) -> Tensor:
        return logits[id(ids_T)].float().log_softmax(-1)

    return log_probabilities
