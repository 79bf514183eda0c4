"""A model folder opened with its stock class, to be measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moefy.convert.oracle import attach
from moefy.models.opening import check_loaded, open_model, runnable


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a model folder with its stock class in `dtype`; with norms, put their router in.

    Raises:
        MoefyError: code 3, when transformers cannot, or when keys are missing or left over.
    """
    model, info = open_model(folder, dtype=dtype)
    check_loaded(folder, info)
    return attach(runnable(model.eval()), dict(_norms(folder)))


def _norms(folder: Path) -> Iterator[tuple[int, torch.Tensor]]:
    file = folder / "moefy" / "calibration.safetensors"
    if file.is_file():
        for name, norm_EN in load_file(file).items():
            if name.startswith("norm."):
                yield int(name.removeprefix("norm.")), norm_EN
