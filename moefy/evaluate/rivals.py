"""Rivals: what else could be done with the dense model to read or compute as little as the run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from moefy.checkpoint.cut import num_parameters, open_cut, without
from moefy.config.options import nearest
from moefy.config.recipe import Recipe
from moefy.config.report import Settings
from moefy.convert.depth import Losses, drops, probes
from moefy.convert.prepare import read_source
from moefy.errors import MoefyError
from moefy.evaluate import ggml, tables
from moefy.evaluate.cache import VERSIONS, digest
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.session import Session
from moefy.evaluate.sizes import sizes
from moefy.models.load import runnable

LAYERS = "layers-dropped"

NAMES = (LAYERS, *ggml.TYPES)
"""What `--against` takes of them."""

OWN = ("q8_0", "q4_K_M")
"""The types of the run itself in `--rivals`, so that like is compared with like."""

ROWS = 64
"""Rows of a matrix in which values are counted."""


def named(settings: Settings) -> tuple[str, ...]:
    """The rivals that `--against` names; a folder of that name comes first."""
    return tuple(n for n in settings.against if n in NAMES and not Path(n).is_dir())


def check(settings: Settings) -> None:
    """Refuse rivals that this machine cannot make.

    Raises:
        MoefyError: code 2 for an unknown type, 5 if a package is missing.
    """
    quantised = quantised_types(settings.quantized)
    if settings.rivals or quantised or set(named(settings)) & {*ggml.TYPES}:
        ggml.library()


def quantised_types(asked: Sequence[str]) -> list[str]:
    """The types that `--quantized` names, however they are spelt.

    Raises:
        MoefyError: code 2 for an unknown one.
    """
    known = {kind.lower(): kind for kind in ggml.TYPES}
    if unknown := [name for name in asked if name.lower() not in known]:
        expected = nearest(unknown[0], [*ggml.TYPES])
        raise MoefyError(f"--quantized {unknown[0]} is no type; {expected}", code=2)
    return [*dict.fromkeys(known[name.lower()] for name in asked)]


def rivals(session: Session, report: dict[str, Any], settings: Settings) -> None:
    """Score each rival on every text, and put its row and its sizes into `report`.

    One is open at a time, beside the dense model.
    """
    dense, texts = session.candidates[0], report["texts"]
    report["rivals"] = {"levels": session.cached("levels", dense, levels)}
    for label, make, measured in _candidates(session, report["models"], settings):
        with session.part(f"rival {label}"):
            candidate = make()
            for name in texts:
                windows = session.windows[name]
                results = session.score([dense, candidate], name, windows)
                num_bytes = tables.num_bytes(session.tokenizer, windows)
                row = tables.score_rows(results, num_bytes)[label]
                texts[name][label] = row
            report["models"][label] = {
                "kind": candidate.kind,
                "meaning": candidate.meaning,
                "folder": None,
                **(measured or session.cache.get("sizes", {"model": candidate.digest}) or {}),
            }


def _candidates(
    session: Session, models: Mapping[str, Any], settings: Settings
) -> Iterator[tuple[str, Callable[[], Candidate], dict[str, Any] | None]]:
    """The label of each rival, how to make it, and its sizes where they are known before."""
    dense = session.candidates[0]
    main = next(c for c in session.candidates if c.label == session.main)
    names = named(settings)
    asked = [kind for kind in ggml.TYPES if kind in names]
    own = [kind for kind in ggml.TYPES if kind in asked or (settings.rivals and kind in OWN)]
    # To count bytes takes gguf, which fewer layers do not need.
    of_dense, of_run = (packed_sizes(session, c) if own else {} for c in (dense, main))
    if settings.rivals:
        reads = [models[main.label]["bytes_read"], *(of_run[kind]["bytes_read"] for kind in OWN)]
        ladder = {kind: row["bytes_read"] for kind, row in of_dense.items()}
        asked = [kind for kind in ladder if kind in asked or kind in around(ladder, reads)]
    if settings.rivals or LAYERS in names:
        yield LAYERS, partial(_fewer_layers, session, models, main), None
    for kind in asked:
        yield kind, partial(_quantised, dense, kind, kind), of_dense[kind]
    for kind in own:
        label = f"{main.label} {kind}"
        yield label, partial(_quantised, main, kind, label), of_run[kind]


def around(ladder: Mapping[str, int], reads: Sequence[int]) -> set[str]:
    """For each number of bytes the nearest type of `ladder`, the one above and the one below.

    >>> sorted(around({"a": 80, "b": 40, "c": 20, "d": 10}, [18]))
    ['b', 'c', 'd']
    """
    kinds, chosen = [*ladder], set()
    for bytes_read in reads:
        distances = [abs(math.log(ladder[kind] / bytes_read)) for kind in kinds]
        nearest = distances.index(min(distances))
        chosen |= {*kinds[max(0, nearest - 1) : nearest + 2]}
    return chosen


def packed_sizes(session: Session, base: Candidate) -> dict[str, dict[str, Any]]:
    """Sizes of a model in each type."""

    def measure(model: Any) -> dict[str, Any]:
        return {
            kind: sizes(model, session.stored, ggml.packed_bytes(model, kind))
            | {"dtype": kind, "types": ggml.counted(model, kind)}
            for kind in ggml.TYPES
        }

    return session.cached("packed-sizes", base, measure)


def _quantised(base: Candidate, kind: str, label: str) -> Candidate:
    """A model in one of llama.cpp's types. It is made once and stays open as long as this does."""

    @functools.cache
    def load(dtype: torch.dtype) -> Any:
        return ggml.quantise(base.open(dtype), kind)

    sources = [kind, base.digest, version("xllamacpp"), version("gguf"), VERSIONS]
    whose = "the dense model" if base.kind == "dense" else "the run"
    return Candidate(label, "rival", f"{whose} in this type of llama.cpp", digest(sources), load)


def _fewer_layers(session: Session, models: Mapping[str, Any], main: Candidate) -> Candidate:
    """The dense model without the layers that cost least, until it computes no more than the run.

    Raises:
        MoefyError: as `read_source` and `drops`.
    """
    dense = session.candidates[0]
    most, whole = (models[label]["flops_per_token"] // 2 for label in (main.label, dense.label))
    removed = whole - most
    source = read_source(Recipe(model=str(dense.folder)))
    parts = source.checkpoint, source.family

    text, layers = session.tokens.sha256, []

    def known(gone: tuple[int, ...], measure: Callable[[], Losses]) -> Losses:
        key = {"model": dense.digest, "tokens": text, "gone": gone}
        return session.cache.once("without-a-layer", key, measure)

    for drop in drops(*parts, probes(session.tokens), session.device, session.watch, known):
        layers.append(drop.layer)
        if num_parameters(source.checkpoint) - drop.parameters >= removed:
            break

    @functools.cache
    def load(dtype: torch.dtype) -> Any:
        return runnable(open_cut(without(*parts, layers), dtype=dtype).eval())

    trained = "; not trained, though the run was" if main.kind == "finetuned" else ""
    meaning = (
        f"the dense model without layers {', '.join(map(str, sorted(layers)))}, which cost the "
        f"least KL one by one on calibration text{trained}"
    )
    sources = [LAYERS, layers, dense.digest, VERSIONS]
    return Candidate(LAYERS, "rival", meaning, digest(sources), load)


def levels(model: Any) -> float:
    """Different values in a block of 32 weights, on average; the median over the matrices.

    Weights that were never quantised have 31 or 32.
    """
    counts = []
    for matrix in ggml.matrices(model):
        rows_RC = matrix.values.reshape(-1, matrix.values.shape[-1])[:ROWS]
        blocks_NB = rows_RC[:, : rows_RC.shape[1] // 32 * 32].reshape(-1, 32).sort(1).values
        changes_N = (blocks_NB[:, 1:] != blocks_NB[:, :-1]).sum(1) + 1
        counts += [fmean(changes_N.tolist())] if len(blocks_NB) else []
    return median(counts)
