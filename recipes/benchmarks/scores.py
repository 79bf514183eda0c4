"""A model's scores on texts against the dense model, whose logits are kept in a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moefy.compute_dtype import ComputeDtype, name_of
from moefy.environment import processor
from moefy.evaluate.candidates import load_model
from moefy.evaluate.dtypes import one_dtype
from moefy.evaluate.metrics import compare, standard_error


def chosen_dtype(asked: str, dense: Path) -> ComputeDtype:
    """The dtype that the dense model and another of its size are scored in; prints it."""
    compute = one_dtype(asked, [dense, dense], torch.device("cpu"))
    print(f"{compute.name}, {processor()}" + (f"; note: {compute.note}" if compute.note else ""))
    return compute


def scores(model: Any, dense: Any, windows: list[Tensor]) -> dict[str, Any]:
    """Perplexity, loss and distance of a model from `dense`, over all windows and by window."""
    results = compare(dense, {"model": model}, windows)
    own, base = results["model"], results["dense"]
    return {
        "dense_perplexity": base.perplexity,
        "perplexity": own.perplexity,
        "dnll": own.nll - base.nll,
        "dnll_standard_error": standard_error(own, base),
        "kl": own.kl,
        "top1": own.agreement,
        "tokens": own.num_tokens,
        "window_tokens": own.tokens_W,
        "window_dnll": [round(a - b, 3) for a, b in zip(own.nll_W, base.nll_W, strict=True)],
    }


@dataclass(frozen=True)
class StoredModel:
    """Answers as the model whose logits on some windows were stored."""

    logits: Mapping[bytes, Tensor]
    """Token ids as bytes -> (T - 1, V)."""
    device: torch.device = torch.device("cpu")

    def __call__(self, ids_1T: Tensor, **_: Any) -> SimpleNamespace:
        """The logits (1, T, V); the last place, which predicts no token, repeats the one before."""
        logits_TV = self.logits[_key(ids_1T)]
        return SimpleNamespace(logits=torch.cat([logits_TV, logits_TV[-1:]])[None])


def stored_model(
    folder: Path, file: Path, windows: list[Tensor], dtype: torch.dtype
) -> StoredModel:
    """The dense model on windows (T,), its logits computed once into a file.

    The file is named after `file` and `dtype`.
    """
    file = file.with_stem(f"{file.stem}-{name_of(dtype)}")
    if not file.exists():
        dense = load_model(folder, dtype)
        with torch.inference_mode():
            stored = [dense(w[None], use_cache=False).logits[0, :-1].clone() for w in windows]
        # Whole or not at all: others may work in the same folder.
        part = file.with_name(f".{file.name}.{os.getpid()}")
        torch.save(stored, part)
        part.replace(file)
    stored = torch.load(file, mmap=True)
    return StoredModel({_key(w): logits_TV for w, logits_TV in zip(windows, stored, strict=True)})


def _key(ids: Tensor) -> bytes:
    return ids.numpy().tobytes()
