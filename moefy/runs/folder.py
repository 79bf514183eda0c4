"""The folder of a finished run: its reports and its recipe, checked before they are used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.resolve import DEMO, resolve
from moefy.checkpoint.validate import check_plain, companion_files
from moefy.config.recipe import Recipe, build, read
from moefy.errors import MoefyError
from moefy.files.publish import sha256
from moefy.files.safetensors_header import (
    ADAPTER,
    CONFIG,
    MAX_INDEX,
    read_config,
    read_entries,
    read_header,
    read_json,
    regular_file,
    some,
)
from moefy.models import families

REPORT, RECIPE, TOKENS = "conversion.json", "recipe.toml", "calibration.safetensors"
FINETUNED = "finetune.json"
"""Files of a run's `moefy` folder."""

Form = Any
"""A type, or several; a list of one form; a table of forms by key, where `...` is any key."""

NUMBER = (int, float)
NAMES: Form = {...: str}
CONVERSION: Form = {
    "moefy": str,
    "model": str,
    "hub_id": (str, type(None)),
    "family": str,
    "task": str,
    "target": str,
    "engines": [str],
    "shape": {
        **dict.fromkeys(
            ("num_neurons", "num_shared", "num_experts", "expert_width", "experts_per_token"), int
        ),
        "active_fraction": NUMBER,
    },
    "layers": [{"layer": int}],
    "layers_left_dense": [int],
    "calibration": {
        **dict.fromkeys(("sequences", "heldout_sequences", "sequence_length", "documents"), int),
        "source": str,
        "sha256": str,
        "notes": [str],
    },
    "reopened": {"class": str, "hidden_state_error": NUMBER},
    "notes": [str],
    "inputs": NAMES,
    "outputs": NAMES,
}
TUNING: Form = {
    "parent": {"folder": str, "files": NAMES},
    "teacher": {"model": (str, type(None)), "files": NAMES},
    "train": {"source": str},
    "settings": dict,
    "tokens": int,
    "validation": {when: {"loss": NUMBER} for when in ("before", "after")},
    "guard": [dict],
    "outputs": NAMES,
}


def read_report(run: Path) -> dict[str, Any]:
    """The conversion report of a finished run.

    Raises:
        MoefyError: code 3, if there is none, or one of another form.
    """
    summary = _read(run, REPORT, CONVERSION)
    if summary["family"] not in families.names():
        raise _no_run(run, f"{REPORT} names the family {summary['family']!r}")
    return summary


def read_tuning(run: Path) -> dict[str, Any] | None:
    """The report of the fine-tune that wrote a run; None for a conversion.

    Raises:
        MoefyError: code 3, for one of another form.
    """
    return _read(run, FINETUNED, TUNING) if os.path.lexists(run / "moefy" / FINETUNED) else None


def open_run(run: Path) -> dict[str, Any]:
    """The conversion report of a finished run, after a check of its files' headers.

    Raises:
        MoefyError: code 3, if it is no run or damaged; 4, if it needs code of its own.
    """
    summary = read_report(run)
    check_folder(run)
    read_header(regular_file(run / "moefy", TOKENS))
    return summary


def check_folder(folder: Path) -> None:
    """Check the files of a model, dense or not, before transformers opens it.

    Raises:
        MoefyError: as `open_run`.
    """
    if read_config(folder).get("auto_map"):
        raise MoefyError(f"{folder / CONFIG} needs code of its own (auto_map), never run", code=4)
    read_entries(folder)
    companion_files(folder)


def read_recipe(run: Path) -> Recipe:
    """The recipe of a finished run.

    Raises:
        MoefyError: code 3, if there is none, or a broken one.
    """
    try:
        return build(None, read(regular_file(run / "moefy", RECIPE)), [])
    except MoefyError as error:
        raise _no_run(run, str(error)) from None


@dataclass(frozen=True)
class DenseModel:
    """A dense model that a run is compared with, or learns from."""

    folder: Path
    digests: dict[str, str]
    """SHA-256 of the files of its weights."""

    def is_source(self, summary: Mapping[str, Any]) -> bool:
        """Whether a run was converted from these weights, by its report."""
        inputs = summary["inputs"]
        return {name: inputs[name] for name in self.digests if name in inputs} == self.digests


def dense_model(
    run: Path, summary: Mapping[str, Any], recipe: Recipe, other: str | None, flag: str
) -> DenseModel:
    """The dense model of a run, or the `other` one that the user names by `flag`, whatever it is.

    Raises:
        MoefyError: code 3, if the run's is gone or has other weights now; and as `check_plain`.
    """
    gone = not (summary["hub_id"] or recipe.model == DEMO or os.path.isdir(recipe.model))
    if other is None and gone:
        raise MoefyError(
            f"the dense model of {run} is not at {recipe.model}; name its folder by {flag}"
        )
    recorded = other in (None, recipe.model) and summary["hub_id"]
    folder = resolve(other or recipe.model, revision=recipe.revision if recorded else None)
    entries = check_plain(folder, ignore_index=recipe.ignore_index)
    files = sorted({entry.file for entry in entries.values()})
    dense = DenseModel(folder, {file.name: sha256(file) for file in files})
    if other is None and not dense.is_source(summary):
        raise MoefyError(
            f"{folder} is not the model that {run} was converted from: its weights differ; name "
            f"that one, or another one, by {flag}"
        )
    return dense


def written(run: Path, summary: Mapping[str, Any]) -> dict[str, str]:
    """The digests of a run's files, by the report of its last stage.

    Raises:
        MoefyError: code 3, for a broken report of a fine-tune.
    """
    digests = (read_tuning(run) or summary)["outputs"]
    if f"moefy/{RECIPE}" in digests:
        return digests
    # Old fine-tunes recorded their weights alone; the other files are the conversion's.
    changed = {CONFIG, f"moefy/{RECIPE}"}
    taken = {
        name: digest
        for name, digest in summary["outputs"].items()
        if name not in changed and not name.startswith("model")
    }
    return taken | digests


def check_present(run: Path, digests: Mapping[str, str]) -> None:
    """Check that the files of a run exist, whatever they hold.

    Raises:
        MoefyError: code 3.
    """
    if missing := [name for name in digests if not (run / name).is_file()]:
        raise MoefyError(f"{run} lacks {some(missing)}, which the run wrote")


def _read(run: Path, name: str, form: Form) -> dict[str, Any]:
    try:
        value = read_json(regular_file(run / "moefy", name), MAX_INDEX)
    except MoefyError as error:
        raise _no_run(run, _other_kind(run) or str(error)) from None
    if (place := _misfit(value, form)) is not None:
        raise _no_run(run, f"{name} has no {place}, or one of another kind")
    return value


def _misfit(value: Any, form: Form, place: str = "") -> str | None:
    """The place where `value` does not have a form; None if it does."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return place or "table"
        rows = [(key, form[...]) for key in value] if ... in form else form.items()
        parts = [(value.get(key), inner, f"{place}.{key}".lstrip(".")) for key, inner in rows]
    elif isinstance(form, list):
        if not isinstance(value, list):
            return place
        parts = [(item, form[0], f"{place}.{number}") for number, item in enumerate(value)]
    else:
        fits = isinstance(value, form) and not (isinstance(value, bool) and form is not bool)
        return None if fits else place
    wrong = (_misfit(*part) for part in parts)
    return next((place for place in wrong if place is not None), None)


def _other_kind(folder: Path) -> str | None:
    """The kind of a folder or file that is not a run; None if it may be a broken run."""
    if folder.is_file():
        return "a GGUF file" if folder.suffix == ".gguf" else "a file"
    if not folder.is_dir():
        return "no such folder"
    names = {file.name for file in folder.iterdir()}
    if not names:
        return "an empty folder"
    if "moefy" in names:
        return None
    if ADAPTER in names:
        return "an adapter: merge it first (merge_and_unload), then convert the result"
    if CONFIG in names:
        return _kind_of_model(folder)
    if any(name.endswith(".gguf") for name in names):
        return "a folder of GGUF files"
    return None


def _kind_of_model(folder: Path) -> str | None:
    try:
        config = read_config(folder)
    except MoefyError:
        return None
    if any("expert" in key for key, value in config.items() if value):
        return "a Mixture of Experts without the report of a conversion"
    return "a dense model: convert it first"


def _no_run(run: Path, reason: str) -> MoefyError:
    reason = reason.partition("; fetch it again")[0]  # advice for files of the Hub
    return MoefyError(
        f"{run} is not a whole run of moefy ({reason}); expected a folder that `moefy convert` "
        "wrote"
    )
