"""The models of a report: dense, every stage of the run, and the stages of other runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moefy.convert.oracle import attach
from moefy.errors import MoefyError
from moefy.evaluate.cache import folder_digest
from moefy.files.publish import sha256
from moefy.models.load import check_loaded, open_model, runnable
from moefy.report.format import active_share
from moefy.runs.folder import REPORT, DenseModel, open_run, read_tuning
from moefy.text.tokenizer import load_tokenizer

PROBE = "The 3 quick brown foxes cost $12.50;\n\tdef f(x):\n    return x**2  # naïve, 東京"
"""A text in which tokenizers differ: digits, spaces, code, accents, another script."""


@dataclass(frozen=True)
class Candidate:
    """A model that the report compares: one column of its tables."""

    label: str
    kind: str
    """dense, converted, finetuned, control, or other (a method of `--against`)."""
    meaning: str
    digest: str
    """SHA-256 of the weights, or of everything that they are made from."""
    open: Callable[[torch.dtype], Any]
    """Loads the model in a dtype, ready for evaluation."""
    folder: Path | None = None
    """Folder of the weights; None for a control, which is deleted after the report."""
    summary: dict[str, Any] | None = None
    """conversion.json of a run."""
    active: float | None = None
    """Share of the FFN neurons that are active."""


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """A model folder loaded with its stock class; an oracle run gets its oracle routers.

    Raises:
        MoefyError: code 3, when transformers cannot load it, or when keys are missing or left over.
    """
    model, info = open_model(folder, dtype=dtype)
    check_loaded(folder, info)
    return attach(runnable(model.eval()), dict(_oracle_norms(folder)))


def _oracle_norms(folder: Path) -> Iterator[tuple[int, torch.Tensor]]:
    file = folder / "moefy" / "calibration.safetensors"
    if file.is_file():
        for name, norm_EN in load_file(file).items():
            if name.startswith("norm."):
                yield int(name.removeprefix("norm.")), norm_EN


def dense_candidate(dense: DenseModel, *, converted: bool) -> Candidate:
    """The dense model: the one that was `converted`, or another one that `--dense` names."""
    folder = dense.folder
    meaning = "the model that was converted" if converted else "a model that --dense names"
    digest = folder_digest(folder, dense.digests)
    return Candidate(
        "dense", "dense", meaning, digest, partial(load_model, folder), folder, active=1.0
    )


def run_candidates(run: Path, name: str | None = None) -> tuple[list[Candidate], list[str]]:
    """Every stage of a run from the first to the last, and a reason for each missing stage.

    A fine-tuned run names its parent, which is a stage as long as its folder exists. `name` is put
    before the labels, to tell runs apart.

    Raises:
        MoefyError: code 3, when `run` is no whole run.
    """
    stages: list[Candidate] = []
    missing: list[str] = []
    folder: Path | None = run
    while folder is not None:
        summary, tuning = open_run(folder), read_tuning(folder)
        stages.append(_stage(folder, summary, tuning))
        folder = _parent(folder, tuning, missing) if tuning else None
        if folder is not None and any(stage.folder == folder for stage in stages):
            raise MoefyError(f"{run}: moefy/finetune.json names itself among its own parents")
    return _labelled(stages[::-1], name), missing


def _stage(folder: Path, summary: dict[str, Any], tuning: dict[str, Any] | None) -> Candidate:
    kind, meaning = "converted", "the experts as `moefy convert` wrote them"
    if tuning is not None:
        kind, meaning = "finetuned", f"the same after fine-tuning on {tuning['tokens']:,} tokens"
    digest, load = folder_digest(folder), partial(load_model, folder)
    return Candidate(kind, kind, meaning, digest, load, folder, summary, active_share(summary))


def finetuning(candidate: Candidate) -> dict[str, Any] | None:
    """The summary and the loss curve of a fine-tuned candidate; None for every other one."""
    folder = candidate.folder
    if candidate.kind != "finetuned" or folder is None:
        return None
    curve = []
    file = folder / "moefy" / "finetune.jsonl"
    with contextlib.suppress(ValueError):  # the last line of a run that was cut short
        for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
            curve.append(json.loads(line))
    return {"summary": read_tuning(folder), "curve": curve}


def check_tokenizer(dense: Any, candidate: Candidate) -> None:
    """Refuse a candidate whose tokenizer differs from that of the dense model.

    Raises:
        MoefyError: code 3.
    """
    assert candidate.folder is not None
    own = load_tokenizer(candidate.folder)
    differs = own.get_vocab() != dense.get_vocab()
    if differs or own(PROBE)["input_ids"] != dense(PROBE)["input_ids"]:
        raise MoefyError(
            f"{candidate.folder} has another tokenizer than the dense model ({len(own):,} and "
            f"{len(dense):,} tokens), and their likelihoods cannot be compared; expected a run of "
            "that model, or its own dense model by --dense"
        )


def _labelled(stages: list[Candidate], name: str | None) -> list[Candidate]:
    """The stages with different labels: a second fine-tuning gets a number."""
    labels, counts = [], Counter()
    for stage in stages:
        counts[stage.label] += 1
        labels.append(f"{stage.label} {counts[stage.label]}".removesuffix(" 1"))
    if name is not None:
        labels = [name if len(stages) == 1 else f"{name}: {label}" for label in labels]
    return [
        dataclasses.replace(stage, label=label) for stage, label in zip(stages, labels, strict=True)
    ]


def _parent(folder: Path, tuning: dict[str, Any], missing: list[str]) -> Path | None:
    """The folder that a fine-tuning started from, if it exists and has the same weights still."""
    parent = tuning["parent"]
    reason = "is not there"
    for place in _places(folder, parent["folder"]):
        if not (place / "moefy" / REPORT).is_file():
            continue
        files = [place / name for name in parent["files"]]
        if parent["files"] == {file.name: sha256(file) for file in files if file.is_file()}:
            return place
        reason = "has other weights now"
    name = parent["folder"] or "the run"
    missing.append(f"{name} that {folder.name} was fine-tuned from {reason}")
    return None


def _places(folder: Path, parent: str) -> Iterator[Path]:
    if parent:
        yield Path(parent)
        yield folder / parent
        yield folder.parent / Path(parent).name  # both may have been moved together
