"""A model's scores on texts against the dense model, whose logits are kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
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
    compute = one_dtype(asked, [dense, dense])
    print(f"{compute.name}, {processor()}" + (f"; note: {compute.note}" if compute.note else ""))
    return compute


def scores(model: Any, dense: Callable[[Tensor], Tensor], windows: list[Tensor]) -> dict[str, Any]:
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


def dense_logits(
    folder: Path, file: Path, windows: list[Tensor], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """A function from a window (T,) to the dense model's log-probabilities on it, (T - 1, V).

    The logits are computed once, and kept in a file named after `file` and `dtype`.
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
    logits = dict(zip(map(id, windows), torch.load(file, mmap=True), strict=True))

    def log_probabilities(ids_T: Tensor) -> Tensor:
        return logits[id(ids_T)].float().log_softmax(-1)

    return log_probabilities
