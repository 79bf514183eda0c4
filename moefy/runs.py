"""The folder of a finished run: what it tells of itself, read with the care that a model's gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moefy import families
from moefy.errors import MoefyError
from moefy.headers import (
    CONFIG,
    MAX_INDEX,
    read_config,
    read_entries,
    read_header,
    read_json,
    regular_file,
)
from moefy.recipe import Recipe, build, read
from moefy.validate import beside

REPORT, RECIPE, TOKENS = "conversion.json", "recipe.toml", "calibration.safetensors"
"""Files of a run's `moefy` folder."""

KINDS: dict[str, type] = {
    "model": str,
    "family": str,
    "target": str,
    "shape": dict,
    "layers": list,
    "calibration": dict,
    "notes": list,
    "inputs": dict,
    "outputs": dict,
}
SHAPE = "num_neurons num_shared num_experts expert_width experts_per_token".split()
CALIBRATION = "sequences heldout_sequences sequence_length documents".split()
"""Whole numbers in the report's tables of these names."""


def read_report(run: Path) -> dict[str, Any]:
    """The conversion report of a finished run.

    Raises:
        MoefyError: code 3, when there is none, or one of another form.
    """
    try:
        summary = read_json(regular_file(run / "moefy", REPORT), MAX_INDEX)
        _check(summary)
    except MoefyError as error:
        raise _no_run(run, str(error)) from None
    return summary


def open_run(run: Path) -> dict[str, Any]:
    """The conversion report of a finished run, whose files are whole as far as they tell.

    Raises:
        MoefyError: code 3, when it is no run, or one that is damaged; 4, for one that needs code of
            its own.
    """
    summary = read_report(run)
    check_folder(run)
    read_header(regular_file(run / "moefy", TOKENS))
    return summary


def check_folder(folder: Path) -> None:
    """Look at the files of a model, dense or not, that transformers is to open.

    Raises:
        MoefyError: as `open_run`.
    """
    if read_config(folder).get("auto_map"):
        raise MoefyError(f"{folder / CONFIG} needs code of its own (auto_map), never run", code=4)
    read_entries(folder)
    beside(folder)


def read_recipe(run: Path) -> Recipe:
    """The recipe of a finished run.

    Raises:
        MoefyError: code 3, when there is none, or one that can be none.
    """
    try:
        return build(None, read(regular_file(run / "moefy", RECIPE)), [])
    except MoefyError as error:
        raise _no_run(run, str(error)) from None


def _check(summary: dict[str, Any]) -> None:
    """Raise code 3 when a report is not of the form that `moefy convert` writes."""
    for key, kind in KINDS.items():
        if not isinstance(summary.get(key), kind):
            raise MoefyError(f"{REPORT} has no {key}, or one of another kind")
    for table, keys in (("shape", SHAPE), ("calibration", CALIBRATION)):
        for key in keys:
            if type(summary[table].get(key)) is not int:
                raise MoefyError(f"{REPORT} has no {table}.{key}, or one of another kind")
    if not isinstance(summary["shape"].get("active_fraction"), float | int):
        raise MoefyError(f"{REPORT} has no shape.active_fraction, or one of another kind")
    if summary["family"] not in families.names():
        raise MoefyError(f"{REPORT} names the family {summary['family']!r}")


def _no_run(run: Path, reason: str) -> MoefyError:
    return MoefyError(
        f"{run} is not a whole run of moefy ({reason}); expected a folder that `moefy convert` "
        "wrote"
    )
