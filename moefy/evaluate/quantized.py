"""The run in llama.cpp's types, beside itself and the dense model in 32 bits."""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate import ggml, rivals
from moefy.evaluate.cache import tensors_digest
from moefy.evaluate.dtypes import num_bytes, room
from moefy.evaluate.metrics import Score, compare_with
from moefy.evaluate.session import Session

RUN, DENSE = "run", "dense"
TYPE, ROUTERS_TOO = "type", "type, routers too"
"""The run in a type, with its routers in 32 bits as all files have them, and in the type."""


def quantized(session: Session, settings: Settings) -> dict[str, Any]:
    """Scores of the run's last stage as it is, in each type, and with its routers in that type.

    All models compute in float32, so that nothing else is rounded.

    Raises:
        MoefyError: code 5, where four models in float32 do not fit into memory.
    """
    by_label = {candidate.label: candidate for candidate in session.candidates}
    dense, main = by_label["dense"], by_label[session.main]
    assert dense.folder is not None and main.folder is not None
    device = session.device
    needed, free = num_bytes([dense.folder, *[main.folder] * 3], torch.float32), room(device)
    if needed > free:
        raise MoefyError(
            f"four models in float32 take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            code=5,
        )
    versions = {name: version(name) for name in ("xllamacpp", "gguf")}

    def scores(kind: str, text: str) -> list[Any]:
        windows = session.windows[text]

        def measure() -> list[Any]:
            references = {DENSE: dense.open(torch.float32), RUN: main.open(torch.float32)}
            models = {
                TYPE: ggml.quantise(main.open(torch.float32), kind),
                ROUTERS_TOO: ggml.quantise(main.open(torch.float32), kind, routers=True),
            }
            found = compare_with(
                {name: model.to(device) for name, model in references.items()},
                {name: model.to(device) for name, model in models.items()},
                windows,
                watch=partial(session.watch, f"{kind} on {text}"),
            )
            return [[*pair, dataclasses.asdict(score)] for pair, score in found.items()]

        key = {"type": kind, "text": tensors_digest(windows), "dense": dense.digest, **versions}
        return session.cache.once("quantized", {"model": main.digest, **key}, measure)

    packed = rivals.packed_sizes(session, main)
    rows = []
    for kind in rivals.quantised_types(settings.quantized):
        by_text = {text: _scores(scores(kind, text)) for text in session.windows}
        names = (TYPE, ROUTERS_TOO) if rows else (RUN, TYPE, ROUTERS_TOO)
        rows += [
            {
                "type": "" if name == RUN else kind,
                "routers": name == ROUTERS_TOO,
                "weight_bytes": None if name == RUN else packed[kind]["weight_bytes"],
                "texts": [_row(text, found, name) for text, found in by_text.items()],
            }
            for name in names
        ]
    tokens = sum(len(ids_T) - 1 for windows in session.windows.values() for ids_T in windows)
    return {"label": main.label, "tokens": tokens, "rows": rows}


def _scores(rows: list[Any]) -> dict[tuple[str, str], Score]:
    return {(name, other): Score(**score) for name, other, score in rows}


def _row(text: str, scores: dict[tuple[str, str], Score], name: str) -> dict[str, Any]:
    to_dense, to_run = scores[name, DENSE], scores[name, RUN]
    return {
        "text": text,
        "dnll": to_dense.nll - scores[DENSE, DENSE].nll,
        "kl_dense": to_dense.kl,
        "kl_run": to_run.kl,
        "top1_run": to_run.agreement,
    }
