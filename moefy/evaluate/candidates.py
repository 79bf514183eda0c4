"""The models of a report: dense, every stage of the run, other runs, and the controls."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.evaluate.cache import folder_digest
from moefy.evaluate.load import load_model
from moefy.files.publish import sha256
from moefy.runs.folder import REPORT, DenseModel, open_run, read_tuning
from moefy.text.tokenizer import load_tokenizer

PROBE = "The 3 quick brown foxes cost $12.50;\n\tdef f(x):\n    return x**2  # naïve, 東京"
"""A text in which tokenizers differ: digits, spaces, code, accents, another script."""


@dataclass(frozen=True)
class Candidate:
    """One column of a report."""

    label: str
    kind: str
    """dense, converted, finetuned, control, or other: a method that the run is held against."""
    meaning: str
    digest: str
    """Of the weights, or of all that they are made from."""
    open: Callable[[torch.dtype], Any]
    """Load the model in a dtype, ready for evaluation."""
    folder: Path | None = None
    """Where the weights lie; a control's are not kept."""
    summary: dict[str, Any] | None = None
    """conversion.json of a run."""
    active: float | None = None
    """Share of the FFN's neurons that are active."""


def dense_candidate(dense: DenseModel, *, converted: bool) -> Candidate:
    """The dense model, which was `converted` or else given in the place of the one that was."""
    folder = dense.folder
    meaning = "the model that was converted" if converted else "a model that --dense names"
    digest = folder_digest(folder, dense.digests)
    return Candidate("dense", "dense", meaning, digest, opener(folder), folder, active=1.0)


def run_candidates(run: Path, name: str | None = None) -> tuple[list[Candidate], list[str]]:
    """Every stage of a run, the first first, and what is missing of them.

    A fine-tuned run knows the one that it started from, which is a stage as long as it is there.
    `name` is put before labels, to tell runs apart.

    Raises:
        MoefyError: code 3, when `run` is no whole run.
    """
    found: list[Candidate] = []
    missing: list[str] = []
    folder: Path | None = run
    while folder is not None:
        summary = open_run(folder)
        tuned = read_tuning(folder)
        kind = "converted" if tuned is None else "finetuned"
        meaning = (
            "the experts as `moefy convert` wrote them"
            if tuned is None
            else f"the same after fine-tuning on {tuned['tokens']:,} tokens"
        )
        active = _active(summary)
        digest = folder_digest(folder)
        found.append(
            Candidate(kind, kind, meaning, digest, opener(folder), folder, summary, active)
        )
        folder = _parent(folder, tuned, missing) if tuned else None
        if folder is not None and any(stage.folder == folder for stage in found):
            raise MoefyError(f"{run}: moefy/finetune.json names a parent that it comes before")
    return _labelled(found[::-1], name), missing


def _active(summary: dict[str, Any]) -> float:
    """Share of all layers' neurons that are active; those of dense layers all are."""
    converted, dense = len(summary["layers"]), len(summary["layers_left_dense"])
    share = summary["shape"]["active_fraction"]
    return (dense + converted * share) / (dense + converted)


def finetuning(stage: Candidate) -> dict[str, Any] | None:
    """What `moefy finetune` told of a stage: its summary and its curve; None if it told nothing."""
    folder = stage.folder
    if stage.kind != "finetuned" or folder is None:
        return None
    curve = []
    file = folder / "moefy" / "finetune.jsonl"
    for line in file.read_text("utf-8").splitlines() if file.is_file() else []:
        try:
            curve.append(json.loads(line))
        except ValueError:  # the last line of a run that was cut short
            break
    return {"summary": read_tuning(folder), "curve": curve}


def check_tokenizer(dense: Any, stage: Candidate) -> None:
    """Refuse a stage whose tokenizer is another than the dense model's.

    Raises:
        MoefyError: code 3.
    """
    assert stage.folder is not None
    own = load_tokenizer(stage.folder)
    differs = own.get_vocab() != dense.get_vocab()
    if differs or own(PROBE)["input_ids"] != dense(PROBE)["input_ids"]:
        raise MoefyError(
            f"{stage.folder} has another tokenizer than the dense model ({len(own):,} and "
            f"{len(dense):,} tokens); their likelihoods cannot be compared; expected a run of that "
            "model, or give its own with --dense"
        )


def opener(folder: Path) -> Callable[[torch.dtype], Any]:
    """A function that loads a folder's model in a dtype."""

    return partial(load_model, folder)


def _labelled(found: list[Candidate], name: str | None) -> list[Candidate]:
    """With labels that differ: a second fine-tuning is numbered."""
    labels: list[str] = []
    for stage in found:
        count = 1 + sum(other.rstrip(" 0123456789") == stage.label for other in labels)
        labels.append(stage.label if count == 1 else f"{stage.label} {count}")
    if name is not None:
        labels = [name if len(found) == 1 else f"{name}: {label}" for label in labels]
    return [
        dataclasses.replace(stage, label=label) for stage, label in zip(found, labels, strict=True)
    ]


def _parent(folder: Path, tuned: dict[str, Any], missing: list[str]) -> Path | None:
    """The folder that a fine-tuning started from, if it is there and has the same weights still."""
    parent = tuned["parent"]
    reason = "is not there"
    for place in _places(folder, parent["folder"]):
        if not (place / "moefy" / REPORT).is_file():
            continue
        files = {name: place / name for name in parent["files"]}
        if all(file.is_file() for file in files.values()) and parent["files"] == {
            name: sha256(file) for name, file in files.items()
        }:
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
